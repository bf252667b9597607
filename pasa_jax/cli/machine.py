"""pasa-jax tune and pasa-jax info."""

from pasa_jax.cli.parsing import call


def tune(argv: list[str]) -> None:
    """pasa-jax tune: a kernel's options timed on this machine."""
    from pasa_jax.tune import tune as measure

    call(measure, "tune", argv, "Times a kernel's options on this device and keeps the best.")


def info(argv: list[str]) -> None:
    """pasa-jax info: which kernels run here."""
    from pasa_jax.info import info as told

    call(told, "info", argv, "Says which implementation of each operation runs here, and why.")
