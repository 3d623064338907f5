"""Who is measured: dckpt, its peers, and the hardware's limits, each as a `Contender`."""
