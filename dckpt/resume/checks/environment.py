"""The program, its libraries, and the switches of its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

from dckpt.findings import Finding, Severity
from dckpt.resume.checks.base import Check, Evidence, finding, get, not_checked, some

_LOGGING = ("log", "wandb", "tensorboard", "name", "notes", "tags", "comment", "output_dir", "report")


def check_code(evidence: Evidence) -> Iterator[Finding]:
    """The same commit and the same uncommitted changes; without git the same script."""
    old, new = get(evidence.saved, "code"), get(evidence.current, "code")
    user_old, user_new = get(evidence.saved, "user.code"), get(evidence.current, "user.code")
    if user_old is not None and user_new is not None:
        old, new = {"commit": str(user_old)}, {"commit": str(user_new)}
    if not old or not new:
        yield not_checked(
            "code", "the version of the program is not known", 'pass facts={"code": <commit>} to TrainState'
        )
        return
    for name, what in (
        ("commit", "the commit"),
        ("changes", "the uncommitted changes"),
        ("script_digest", "the script"),
    ):
        if name == "script_digest" and "commit" in old and "commit" in new:
            continue
        if old.get(name) != new.get(name) and (name != "changes" or old.get("commit") == new.get("commit")):
            yield finding(
                "code",
                "warning",
                f"{what} of the program differs from the one that saved",
                expected=old.get(name) or "none",
                found=new.get(name) or "none",
                remedy="check out the saved commit, or look at the difference before you go on",
            )
            return


def check_config(evidence: Evidence) -> Iterator[Finding]:
    """The configuration that the user gave, key by key; keys of logging alone are information."""
    old, new = get(evidence.saved, "user.config"), get(evidence.current, "user.config")
    if old is None or new is None:
        yield not_checked("config", "no configuration is known", 'pass facts={"config": {...}} to TrainState')
        return
    if old == new:
        return
    before, now = _flat(old), _flat(new)
    changed = sorted(key for key in {**before, **now} if before.get(key) != now.get(key))
    is_logging = all(any(word in key.lower() for word in _LOGGING) for key in changed)
    shown = [f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}" for key in changed]
    yield finding(
        "config",
        "info" if is_logging else "warning",
        f"the configuration changed in {len(changed)} place{'s' if len(changed) != 1 else ''}: {some(shown)}",
        expected=some([f"{key}={before.get(key, 'absent')}" for key in changed]),
        found=some([f"{key}={now.get(key, 'absent')}" for key in changed]),
        remedy="go on if each change is meant",
    )


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {
            name: item
            for key, inner in value.items()
            for name, item in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: value}


def check_versions(evidence: Evidence) -> Iterator[Finding]:
    """Libraries and hardware; another patch release is information, anything more may change numbers."""
    old, new = get(evidence.saved, "versions") or evidence.checkpoint.get("writer"), get(evidence.current, "versions")
    if not old or not new:
        yield not_checked("versions", "the versions are not known on both sides", "nothing to do")
        return
    serious: list[str] = []
    small: list[str] = []
    for name in sorted(set(old) & set(new)):
        if old[name] != new[name]:
            text = f"{name} {old[name]} -> {new[name]}"
            (small if _is_patch(str(old[name]), str(new[name])) or name == "dckpt" else serious).append(text)
    for severity, changed in (("warning", serious), ("info", small)):
        if changed:
            level: Severity = "warning" if severity == "warning" else "info"
            yield finding(
                "versions",
                level,
                f"versions changed: {', '.join(changed)}",
                expected="the versions that saved",
                found=", ".join(changed),
                remedy="expect results that are equal only up to rounding",
            )


def _is_patch(old: str, new: str) -> bool:
    return old.split("+")[0].split(".")[:2] == new.split("+")[0].split(".")[:2] and "." in old


def check_precision(evidence: Evidence) -> Iterator[Finding]:
    """Default dtype, TF32, autocast, determinism, compilation, FSDP's mixed precision."""
    old, new = get(evidence.saved, "precision"), get(evidence.current, "precision")
    if not old or not new:
        yield not_checked("precision", "the switches of the arithmetic are not known", "nothing to do")
        return
    changed = [f"{name}: {old[name]} -> {new[name]}" for name in old if name in new and old[name] != new[name]]
    if changed:
        yield finding(
            "precision",
            "warning",
            f"the arithmetic changed: {'; '.join(changed)}",
            expected=some([f"{name}={old[name]}" for name in old if name in new and old[name] != new[name]]),
            found=some([f"{name}={new[name]}" for name in old if name in new and old[name] != new[name]]),
            remedy="set the switches as they were, or expect another noise in the loss",
        )


CHECKS = (
    Check("code", "Version of the program", "before", check_code),
    Check("config", "Configuration", "before", check_config),
    Check("versions", "Versions of libraries, kind of device", "before", check_versions),
    Check("precision", "Precision and determinism", "before", check_precision),
)
