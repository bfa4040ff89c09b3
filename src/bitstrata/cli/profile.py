"""What `bitstrata bench --profile` shows: time, work and limit of every operation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from bitstrata.cli.common import cpu_name, output

if TYPE_CHECKING:
    from bitstrata_runtime.profile import OpProfile, Profile

_WORST = 3


def show_profile(title: str, profile: Profile) -> None:
    """Print a profile: the machine, the operations, and which of them lose most."""
    machine, out = profile.machine, output()
    out.print(f"[bold]{title}[/bold], batch {profile.batch}, {cpu_name()}")
    rates = [f"{name} {2 * rate / 1e9:.0f} GOPS" for name, rate in machine.peaks.items()]
    rates += [f"{level.name} {level.bytes_per_second / 1e9:.0f} GB/s" for level in machine.levels]
    out.print("Measured limits of one thread: " + ", ".join(rates))
    out.print(_table(profile))
    _show_worst(profile)


def _table(profile: Profile) -> Table:
    shown = Table(title_justify="left")
    shown.add_column("operation", overflow="fold")
    shown.add_column("kernel", overflow="fold")
    for column in ("us", "time", "MOP", "KB", "GOPS", "GB/s", "peak", "limit", "bound"):
        shown.add_column(column, justify="right", no_wrap=True)
    group = None
    for op in profile.ops:
        if group is not None and op.group != group:
            shown.add_section()  # what stands together ran together, tile by tile
        group = op.group
        shown.add_row(op.name, op.kernel or op.kind, *_numbers(profile, op))
    shown.add_section()
    rest = profile.outside_seconds
    shown.add_row("outside operations", "", f"{rest * 1e6:.1f}", f"{rest / profile.seconds:.1%}")
    operations, moved = sum(op.operations for op in profile.ops), sum(op.bytes for op in profile.ops)
    limit = sum(op.limit_seconds for op in profile.ops) / profile.seconds
    shown.add_row(
        "whole run",
        "",
        f"{profile.seconds * 1e6:.1f}",
        "100.0%",
        f"{operations / 1e6:.2f}",
        f"{moved / 1e3:.1f}",
        f"{operations / profile.seconds / 1e9:.1f}",
        f"{moved / profile.seconds / 1e9:.1f}",
        "",
        f"{limit:.0%}",
        "",
    )
    return shown


def _numbers(profile: Profile, op: OpProfile) -> tuple[str, ...]:
    return (
        f"{op.seconds * 1e6:.1f}",
        f"{profile.share_of_time(op):.1%}",
        f"{op.operations / 1e6:.2f}",
        f"{op.bytes / 1e3:.1f}",
        f"{op.gops:.1f}",
        f"{op.gbps:.1f}",
        "" if op.share_of_peak is None else f"{op.share_of_peak:.0%}",
        f"{op.share_of_limit:.0%}",
        op.bound,
    )


def _show_worst(profile: Profile) -> None:
    out = output()
    out.print("Furthest from their limits, by time lost:")
    for op in profile.worst(_WORST):
        lost = (op.seconds - op.limit_seconds) * 1e6
        out.print(
            f"  {op.name} ({op.kernel or op.kind}): {profile.share_of_time(op):.1%} of the time, "
            f"{op.share_of_limit:.0%} of the {op.bound} limit, {max(lost, 0.0):.1f} us lost"
        )
