# SPDX-License-Identifier: Apache-2.0
"""A plan as text: the table, the verdict against a chip, a remedy that was itself planned, and what was compiled."""

from collections.abc import Iterator, Mapping

from jaxlm.config import RunConfig
from jaxlm.overrides import override
from jaxlm.plan.bounds import by_kind, mfu_bounds, training_flops
from jaxlm.plan.compiled import Compiled
from jaxlm.plan.hlo import Program, read_program
from jaxlm.plan.memory import Memory, estimate
from jaxlm.plan.outline import Outline, make_outline
from jaxlm.train.chips import CHIPS, Chip

GIB = 2**30
ROOM = 0.9  # of the published memory: the runtime, its programs and gaps between arrays take the rest


def memory_table(outline: Outline, memory: Memory) -> str:
    """The rows of `memory` in GiB; of head, layer and update only what is alive at the fullest moment counts."""
    config, mesh = outline.model.config, outline.mesh
    rows, length = outline.batch["tokens"].shape
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    parts = outline.config.run.micro_batches
    counted = {"head": memory.head, "layer": memory.layer, "update": memory.update}
    lines = [
        f"{mesh.size} devices ({sizes}), {rows} x {length} tokens an update in {parts} part{'s' * (parts > 1)}, "
        f"{config.num_layers} layers of width {config.width}, {config.dtype}, remat {config.remat}",
        "",
        f"{'GiB of each device':<44}",
        _row("parameters, float32", memory.parameters),
        _row("optimizer", memory.optimizer),
        _row("isolation: held set, importance", memory.isolation),
        _row("first parameters, kept by the run", memory.kept),
        _row("batch", memory.batch),
        _row("gradients, float32", memory.gradients),
        _row(f"activations saved, remat {config.remat}", memory.saved, memory.moment != "update"),
        *(
            _row(text, counted[name], name == memory.moment)
            for name, text in (
                ("head", "head: hidden states, chunk of logits, gradient"),
                ("layer", "backward pass of one layer"),
                ("update", "what the optimizer writes down"),
            )
        ),
        _row("total at the fullest moment", memory.total),
    ]
    return "\n".join(lines)


def _row(text: str, size: float, counted: bool = True) -> str:
    return f"  {text:<48}{size / GIB:>9.3f}" + ("" if counted else "  (at another moment, not in the total)")


def verdict(memory: Memory, name: str, chip: Chip) -> str:
    """Whether it fits, in a line."""
    holds = chip.memory_gb * 1e9 / GIB
    share = memory.total / GIB / holds
    word = "fits" if fits(memory, chip) else "is too tight for" if share <= 1 else "does not fit"
    return f"{word} {name}: {memory.total / GIB:.2f} of {holds:.1f} GiB ({100 * share:.0f} %, at most {100 * ROOM:.0f})"


def fits(memory: Memory, chip: Chip) -> bool:
    """Whether the run leaves the runtime its room."""
    return memory.total <= ROOM * chip.memory_gb * 1e9


def remedy(config: RunConfig, chip: Chip, *, num_devices: int, shape: str = "") -> str:
    """Overrides with which the run fits, planned like the run itself; or how many devices it would take.

    Tried one on top of the other: parameters divided over all copies of the model, remat, more and more micro-batches.
    """
    changes: list[str] = []
    for change in _changes(config, num_devices):
        changes = [one for one in changes if one.partition("=")[0] not in {c.partition("=")[0] for c in change}]
        changes += change
        memory = estimate(make_outline(override(config, changes), num_devices=num_devices, shape=shape))
        if fits(memory, chip):
            return "set " + " ".join(changes)
    memory = estimate(make_outline(override(config, changes), num_devices=num_devices, shape=shape))
    divided = memory.state + memory.kept + memory.gradients
    room = ROOM * chip.memory_gb * 1e9 - (memory.total - divided)
    needed = f"about {-(-num_devices * divided // room):.0f}" if room > 0 else "more"
    also = f" and {' '.join(changes)}" if changes else ""
    return f"take {needed} devices with mesh.fsdp over all of them{also}, adapters (method.lora), or shorter rows"


def _changes(config: RunConfig, num_devices: int) -> Iterator[list[str]]:
    tensor = max(1, config.mesh.tensor)
    fsdp = num_devices // tensor
    if config.mesh.fsdp != fsdp and config.run.batch_size % fsdp == 0:
        yield ["mesh.data=1", f"mesh.fsdp={fsdp}"]
    if config.model.remat != "full":
        yield ["model.remat=full"]
    parts = 2 * config.run.micro_batches
    while config.run.batch_size % (fsdp * parts) == 0:
        yield [f"run.micro_batches={parts}"]
        parts *= 2


def compiled_text(outline: Outline, compiled: Compiled, chips: Mapping[str, Chip] = CHIPS) -> str:
    """XLA's figures beside the estimate, the collectives of a step, and the bounds on the chips' MFU."""
    program = read_program(compiled.text)
    memory = estimate(outline, on_cpu=True)
    off = memory.step / compiled.step - 1
    flops = training_flops(outline, executed=True) / outline.mesh.size
    lines = [
        f"compiled by the CPU backend in {compiled.seconds:.0f} s, not run; GiB of each device",
        f"  XLA: arguments {compiled.arguments / GIB:.3f} + outputs {compiled.outputs / GIB:.3f} - "
        f"aliased {compiled.aliased / GIB:.3f} + temporary {compiled.temporary / GIB:.3f} = {compiled.step / GIB:.3f}",
        f"  estimate of the same step on CPU: {memory.step / GIB:.3f} ({100 * off:+.1f} %)",
        f"  FLOPs of a step on each device: {program.flops:.3g} in the program, {flops:.3g} by the model's shape",
        *_collective_lines(program),
    ]
    shares = {"as compiled": 1.0}
    if outline.model.config.dtype == "bfloat16":
        shares["half of the bytes: bfloat16 sent, gradients scattered, as accelerators do"] = 0.5
    for what, share in shares.items():
        lines.append(f"  bounds from published rates, {what}")
        for name, chip in chips.items():
            bounds = mfu_bounds(outline, chip, program.collectives, flops=flops, share=share)
            lines.append(
                f"    {name}: products {1e3 * bounds.compute:.0f} ms, collectives {1e3 * bounds.collective:.0f} ms; "
                f"MFU at most {100 * bounds.overlapped:.0f} % overlapped, {100 * bounds.apart:.0f} % in turns"
            )
    return "\n".join(lines)


def _collective_lines(program: Program) -> Iterator[str]:
    yield "  collectives of a step: how many, GiB of their arrays, GiB that leave a device"
    for kind, (count, payload, sent) in by_kind(program.collectives).items():
        yield f"    {kind:<20}{count:>7}{payload / GIB:>10.3f}{sent / GIB:>10.3f}"
    if program.unknown_loops:
        yield f"    {program.unknown_loops} loops do not tell how often they turn and count once"
