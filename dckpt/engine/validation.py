"""The validation of a resume over all ranks: each contributes what it found, the coordinator judges, all hear the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dckpt.catalog.catalog import Catalog
from dckpt.dcp.frozen_rows import combine, look_at_frozen_rows, to_json
from dckpt.engine.attempt import MESSAGE_BYTES_MAX
from dckpt.engine.fingerprints import compare_fingerprints
from dckpt.engine.legs import NewLeg
from dckpt.engine.resume_policy import ResumePolicy
from dckpt.engine.resuming import decide, keep_report, log_report, resume_facts
from dckpt.errors import DckptError
from dckpt.format.checksum import digest_bytes
from dckpt.format.values import dump_json, load_json
from dckpt.ranks.coordination import Coordination
from dckpt.ranks.session import Session
from dckpt.ranks.topology import Topology
from dckpt.resume.checks.registry import CHANGED_BY_A_LEG, CHANGED_BY_A_SCHEDULE
from dckpt.resume.facts.collect import FactCollector
from dckpt.resume.facts.plain import finite
from dckpt.resume.facts.ranks import moved_streams, rank_facts
from dckpt.resume.facts.tensors import average_is_weights
from dckpt.resume.probe import Probe
from dckpt.resume.report import LoadResult, ResumeReport
from dckpt.resume.validator import findings_from_json, judge
from dckpt.state.rng import preserved_rng
from dckpt.state.train_state import TrainState
from dckpt.storage.base import Storage

SHARED_SECTIONS = ("modes", "unsaved_buffers", "tied", "optim", "steps", "scheduler", "scaler", "settings")
"""Sections that are usually equal on all ranks: they travel as digests first, and in full only from ranks that differ."""
SETTINGS = ("batch", "max_steps", "max_epochs", "precision", "versions", "code")
"""Facts that have to be the same on every rank."""


@dataclass
class Validation:
    """Validates loads of one run, on every rank together. Reads every tensor; changes no state and no random stream."""

    storage: Storage
    coordination: Coordination
    topology: Topology
    collector: FactCollector
    probe: Probe | None = field(default=None, init=False)
    count: int = field(default=0, init=False)
    _load: dict[str, Any] = field(default_factory=dict, init=False)

    def run(
        self,
        state: TrainState,
        loaded: LoadResult,
        *,
        allowed: frozenset[str] = frozenset(),
        without: frozenset[str] = frozenset(),
    ) -> ResumeReport:
        """The report, the same on every rank. Raises the same error on every rank if one of them cannot contribute."""
        started = time.monotonic()
        self.count += 1
        what = f"validate(state) of {loaded.checkpoint}"
        session = self.coordination.session(f"validate-{self.count}", what=what, call=what)
        try:
            ranks, current = self._gather(state, loaded, session)
            load = self._load = self._compare(state, loaded, session)
            answer = session.exchange(
                "verdict",
                dump_json(load["average_is_weights"]),
                lambda told: self._judge(
                    loaded, ranks, current, {**load, "ema_equals_weights": _all_true(told)}, (allowed, without), started
                ),
                error=load["failure"],
            )
        finally:
            session.close()
        record = load_json(answer, key="verdict of the coordinator", limit=MESSAGE_BYTES_MAX)
        return ResumeReport(
            loaded,
            self.topology.world_size,
            findings_from_json(record["findings"]),
            record["passed"],
            record["seconds"],
        )

    def accept(
        self, state: TrainState, loaded: LoadResult, policy: ResumePolicy, leg: NewLeg | None = None
    ) -> tuple[ResumeReport, dict[str, Any]]:
        """Validates, tells and keeps the report; returns it, and what later manifests say of it, if training may start.

        Raises `ResumeRejectedError` on every rank if a critical finding is neither allowed nor let pass by a person.
        """
        allowed = frozenset(policy.allow)
        without: frozenset[str] = frozenset()
        if leg is not None and loaded.begins_leg:
            without = CHANGED_BY_A_LEG | (CHANGED_BY_A_SCHEDULE if leg.scheduler == "fresh" else frozenset())
            if _is_split_of_same_data(loaded.manifest.facts, state):
                without -= {"split"}
        report = self.run(state, loaded, allowed=allowed, without=without)
        if self.topology.is_coordinator:
            log_report(report)
            keep_report(self.storage, report)
        let_pass = decide(report, self.coordination, self.topology, countdown_s=policy.countdown_s, number=self.count)
        base = _without_moments(self._load["frozen_rows"]) | dict(loaded.manifest.facts.get("frozen_rows") or {})
        later = {"resumed": resume_facts(report, allowed, let_pass)}
        return report, {**later, "frozen_rows": base} if base else later

    def _gather(
        self, state: TrainState, loaded: LoadResult, session: Session
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """On the coordinator: what each rank found, and the facts of the live run; elsewhere nothing."""
        own: dict[str, Any] = {}
        current: dict[str, Any] = {}
        failure: Exception | None = None
        try:
            # First, and protected: a state_dict() of the user's may draw numbers.
            moved = moved_streams(state, loaded)
            with preserved_rng(state.generators):
                captured = state.capture()
                current = self.collector.collect(state, captured)
                own = finite({**rank_facts(state, captured, loaded, current), "moved_streams": moved})
                own["settings"] = {name: current[name] for name in SETTINGS if name in current}
        except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
            failure = error
        found: list[dict[str, Any]] = []

        def compare(payloads: list[bytes]) -> bytes:
            found.extend(_parse(payload) for payload in payloads)
            mine = found[0]["digests"]
            wanted = {
                str(rank): [name for name in SHARED_SECTIONS if record["digests"][name] != mine[name]]
                for rank, record in enumerate(found)
            }
            return dump_json({rank: names for rank, names in wanted.items() if names})

        payload = b""
        if failure is None:
            try:
                brief = {name: value for name, value in own.items() if name not in SHARED_SECTIONS}
                brief["digests"] = {name: digest_bytes(dump_json(own.get(name))) for name in SHARED_SECTIONS}
                payload = dump_json(brief, limit=MESSAGE_BYTES_MAX)
            except Exception as error:  # noqa: BLE001 - as above
                failure = error
        wanted = _parse(session.exchange("facts", payload, compare, error=failure))
        if wanted:
            mine = {name: own[name] for name in wanted.get(str(self.topology.rank), ())}

            def take(payloads: list[bytes]) -> bytes:
                for record, payload in zip(found, payloads, strict=True):
                    record.update(_parse(payload))
                return b""

            session.exchange("details", dump_json(mine, limit=MESSAGE_BYTES_MAX), take)
        shared = {name: own[name] for name in SHARED_SECTIONS}
        return [{**shared, **record} for record in found], current

    def _compare(self, state: TrainState, loaded: LoadResult, session: Session) -> dict[str, Any]:
        """Facts about the load that take several ranks to find, or what the load alone knows."""
        averages: list[bool | None] = []
        compared = compare_fingerprints(
            state,
            loaded,
            session.exchange,
            self.topology,
            on_bytes=self._beat(session),
            on_live=lambda live: averages.append(average_is_weights(state, live)),
        )
        found: dict[str, Any] = {
            "fingerprints": {
                "differing": list(compared.differ),
                "drifted": dict(compared.drifted),
                "checked": compared.num_checked,
                "without": list(compared.without),
                "reason": compared.reason,
            }
        }
        found["average_is_weights"] = averages[0]
        found["frozen_rows"] = self.frozen_rows(state, session)
        if loaded.fingerprints is not None:
            found["same_mesh"] = loaded.fingerprints.is_same_mesh
        found["failure"] = None
        try:
            found |= self._ask_program(state, loaded)
        except Exception as error:  # noqa: BLE001 - the user's own functions; it travels with the verdict
            found["failure"] = error
        return found

    def _ask_program(self, state: TrainState, loaded: LoadResult) -> dict[str, Any]:
        """What calls functions of the user's: the probe's loss, and learning rates of the schedule as it was built."""
        found: dict[str, Any] = {}
        if self.probe is not None:
            found["probe"] = self.probe.measure(state)
        built = loaded.built
        if built is not None:
            counters = {
                key: item.get("last_epoch") for key, item in (loaded.manifest.facts.get("scheduler") or {}).items()
            }
            with preserved_rng(state.generators):
                found["planned_rates"] = built.planned_rates(counters)
        return found

    def frozen_rows(self, state: TrainState, session: Session) -> dict[str, Any]:
        """Parameter -> rows that must not train, their fingerprint, and what would move them; the same on every rank."""
        if not state.frozen_rows:
            return {}
        own: dict[str, Any] = {}
        failure: Exception | None = None
        try:
            own = to_json(look_at_frozen_rows(state, self.topology))
        except Exception as error:  # noqa: BLE001 - it travels to all ranks, which raise it together
            failure = error
        found = _parse(
            session.exchange(
                "frozen rows",
                dump_json(own),
                lambda all_: dump_json(combine([_parse(item) for item in all_])),
                error=failure,
            )
        )
        return {name: {"rows": list(state.frozen_rows[name]), **item} for name, item in found.items()}

    def probe_facts(self, state: TrainState) -> tuple[dict[str, Any], Exception | None]:
        """The loss of the probe batch now, for the checkpoint that is about to be saved; {} without a probe.

        What fails is given back: it must reach the other ranks, which are about to agree on the save.
        """
        try:
            return {} if self.probe is None else {"probe": self.probe.measure(state)}, None
        except Exception as error:  # noqa: BLE001 - see above
            return {}, error

    def start_facts(self, state: TrainState) -> dict[str, Any]:
        """What manifests say from the first save of a new run on."""
        if not state.frozen_rows:
            return {}
        self.count += 1
        what = "start of a new run"
        session = self.coordination.session(f"start-{self.count}", what=what, call="resume(state)")
        try:
            return {"frozen_rows": _without_moments(self.frozen_rows(state, session))}
        finally:
            session.close()

    @staticmethod
    def _beat(session: Session) -> Callable[[int], None]:
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            session.beat(done)

        return on_bytes

    def _judge(
        self,
        loaded: LoadResult,
        ranks: list[dict[str, Any]],
        current: Mapping[str, Any],
        load: Mapping[str, Any],
        excused: tuple[frozenset[str], frozenset[str]],
        started: float,
    ) -> bytes:
        report = judge(
            loaded,
            world_size=self.topology.world_size,
            current=current,
            ranks=ranks,
            load=load,
            storage=storage_facts(self.storage, loaded),
            allowed=excused[0],
            without=excused[1],
        )
        report = replace(report, seconds=time.monotonic() - started)
        return dump_json(
            {
                "findings": [finding.to_json() for finding in report.findings],
                "passed": report.passed,
                "seconds": report.seconds,
            },
            limit=MESSAGE_BYTES_MAX,
        )


def storage_facts(storage: Storage, loaded: LoadResult) -> dict[str, Any]:
    """History and room; what the storage does not tell is left out."""
    found: dict[str, Any] = {}
    try:
        catalog = Catalog(storage)
        line = catalog.trace()
        found["lineage"] = {
            "notes": list(line.notes),
            "siblings": [
                item.name
                for item in line.superseded
                if item.step == loaded.step and item.generation > loaded.generation
            ],
        }
        size = sum(entry.size for entry in loaded.manifest.files if entry.checkpoint is None)
        found["space"] = {"free": storage.free_bytes(), "checkpoint_bytes": size, "read_only": _read_only(storage)}
    except DckptError:
        return found
    return found


def _read_only(storage: Storage) -> str:
    try:
        storage.ensure_writable()
    except DckptError as error:
        return str(error)
    return ""


def _is_split_of_same_data(saved: Mapping[str, Any], state: TrainState) -> bool:
    """A new leg on as many items as before: another split of them would validate on what was trained on."""
    before, now = (saved.get("user") or {}).get("split"), state.facts.get("split")
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return False
    return before.get("size") is not None and before.get("size") == now.get("size")


def _without_moments(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: {"rows": item["rows"], "fingerprint": item["fingerprint"]} for name, item in rows.items()}


def _all_true(told: Sequence[bytes]) -> bool:
    """Whether every rank that can tell says so, and one can."""
    answers = [load_json(data, key="answer of a rank", limit=MESSAGE_BYTES_MAX) for data in told]
    known = [answer for answer in answers if answer is not None]
    return bool(known) and all(known)


def _parse(data: bytes) -> dict[str, Any]:
    record: dict[str, Any] = load_json(data, key="facts of a rank", limit=MESSAGE_BYTES_MAX)
    return record
