"""Which pairs of rotary dimensions of a head rank keys like the whole head does: measured once for a model, kept in a file.

`python -m foveal.methods.select.frequency_chunks [--model ID] [--out FILE]` measures a model; without FILE the table goes where `table_for`
finds it again.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...command import Command, run
from ...errors import InputError
from ...hub import model_identity
from ...known import known_file, made_for, own_file

SIZES = (128, 256, 512, 1024)
"""How many best keys are compared (the paper: 128 to 4096)."""
PROMPTS, LENGTH, STEPS = 8, 1536, 8
"""Prompts, their tokens, and the decode steps measured on each (the paper: 8 prompts of one question answering set)."""
_FORMAT = "foveal frequency chunks 1"


def rotary_pairs(model, layer: int) -> Tensor:
    """The dimensions that turn together in keys of this layer, [pairs, 2], fastest first; what does not turn is paired in order."""
    eye = torch.eye(model.head_dim)
    turn = model.rope.rotate(eye, 1, layer) - eye
    partner = (turn.fill_diagonal_(0) != 0).int().argmax(1)
    turning = [i for i in range(model.head_dim) if turn[i].any()]
    still = [i for i in range(model.head_dim) if i not in turning]
    pairs = [(i, int(partner[i])) for i in turning if i < partner[i]]
    if not pairs:  # a layer without rotation in a model that has it elsewhere: laid out as in the others
        half = model.head_dim // 2
        return torch.tensor([(i, i + half) for i in range(half)])
    speed = {pair: -turn[pair[0], pair[1]].abs().item() for pair in pairs}
    still_pairs = list(zip(still[::2], still[1::2], strict=True))
    return torch.tensor([*sorted(pairs, key=speed.get), *still_pairs])


@dataclass(frozen=True, eq=False)
class ChunkTable:
    """Agreement of each pair of rotary dimensions with the whole head: the share of a head's best K keys that are also among the pair's
    best K, averaged over decode steps (FASA, "contextual agreement").

    identity: `hub.model_identity` of the model.  agreement: K -> [layers, heads, pairs], 0 to 1.
    """

    identity: dict
    agreement: dict[int, Tensor]
    source: dict

    def best(self, size: int, count: int) -> Tensor:
        """The `count` best pairs of each head at K = size, else (as in the paper) at 1,024, else at the largest: [layers, heads, count]."""
        size = next(k for k in (size, 1024, max(self.agreement)) if k in self.agreement)
        return self.agreement[size].argsort(dim=-1, descending=True, stable=True)[..., :count]

    def save(self, path: Path) -> Path:
        """Write a JSON file; agreement in thousandths."""
        tables = {}
        for size, x in self.agreement.items():
            tables[size] = [[" ".join(map(str, head)) for head in layer] for layer in (x * 1000).round().int().tolist()]
        data = {"format": _FORMAT, "identity": self.identity, "source": self.source, "agreement": tables}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=0) + "\n", encoding="utf-8")
        return path

    @staticmethod
    def load(path: Path) -> "ChunkTable":
        """Read what `save` wrote; raises InputError where there is no such file or it is damaged."""
        try:
            data = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise ValueError(f"its format is {data['format']!r}")
            tables = {
                int(size): torch.tensor([[[int(n) for n in head.split()] for head in layer] for layer in x]) / 1000
                for size, x in data["agreement"].items()
            }
            return ChunkTable(data["identity"], tables, data["source"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"expected a table of frequency chunks, but '{path}' cannot be read as one ({error}): measure it anew"
            ) from error

    def for_model(self, model) -> "ChunkTable":
        """Itself, if measured on this model; else InputError."""
        here = model_identity(model)
        if here["weights"] != self.identity["weights"]:
            raise InputError(
                f"these frequency chunks were measured on {self.identity['name']}, but the model is {here['name']}: "
                f"measure its own with `python -m {__name__} {here['name']}`"
            )
        return self


def table_path(model) -> Path:
    """Where the table a user has measured for this model is kept."""
    return own_file(model, "frequency_chunks", ".json")


def table_for(model, path: str | None = None) -> ChunkTable:
    """The table in `path`, else the one that ships for this model, else the user's own; raises InputError where there is none."""
    if path is None:
        path = known_file(model, "frequency_chunks", ".json", made_for)
    if path is not None:
        return ChunkTable.load(Path(path)).for_model(model)
    identity = model_identity(model)
    name = identity["name"] or identity["architecture"]
    raise InputError(
        f"which frequency chunks of {name} matter is not known: measure them once with `python -m {__name__} --model {name}`, "
        "or take chunks='slowest'"
    )


# ---------------------------------------------------------------------- measuring


def agreement(q: Tensor, k: Tensor, pairs: Tensor, sizes: tuple[int, ...]) -> dict[int, Tensor]:
    """How often pairs of dimensions choose the keys the whole head chooses: K -> [heads, pairs].

    q: [heads, head_dim], one query.  k: [kv_heads, T, head_dim].  Raw logits, both ranked over all T keys.
    """
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    parts = (q[:, pairs][:, :, None] * k[:, :, pairs].transpose(1, 2)).sum(-1)  # [heads, pairs, T]
    order = torch.cat([parts, (q[:, None] @ k.mT)], 1).topk(max(sizes, default=0), -1).indices
    out = {}
    for size in sizes:
        chosen = torch.zeros(*order.shape[:2], k.shape[1], dtype=torch.bool, device=q.device)
        chosen.scatter_(2, order[..., :size], True)
        out[size] = (chosen[:, :-1] & chosen[:, -1:]).sum(-1) / size
    return out


@torch.no_grad()
def measure(
    model, tokenizer, prompts: int = PROMPTS, length: int = LENGTH, steps: int = STEPS, seed: int = 1000, progress=None
) -> ChunkTable:
    """Read questions about a text and follow the model's own greedy answers; agreement of every pair in every decode step.

    seed: away from the small numbers with which tasks are scored.

    Raises UnsupportedModel where the model has no rotary embedding, InputError where it has too few positions.
    """
    from ...attach import attach  # the attachment knows methods; they are not to know it while they load
    from ...method import Method
    from ...tasks import get_task

    found: dict[int, dict[int, Tensor]] = {}

    class Look(Method):
        def after(self, step) -> None:
            if step.decode:
                pairs = found_pairs[step.layer].to(step.device)
                sizes = tuple(n for n in SIZES if 4 * n <= step.T)  # of more keys, chance alone finds too many
                for size, x in agreement(step.q[0, :, 0].float(), step.store.keys()[0].float(), pairs, sizes).items():
                    layer = found.setdefault(size, {})
                    layer[step.layer] = layer.get(step.layer, 0) + x.cpu()

    task = get_task("needle")
    samples = task.samples(tokenizer, length, prompts, seed=seed)
    with attach(model, Look()) as session:
        info = session.info
        found_pairs = {i: rotary_pairs(info, i) for i in info.layers}
        for done, sample in enumerate(samples):
            ids = torch.tensor([[*sample.context, *sample.question]], device=model.device)
            out = model(ids, logits_to_keep=1)
            for _ in range(steps):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values)
            if progress is not None:
                progress(done + 1, len(samples))
    if not found:
        raise InputError(
            f"prompts of {length} tokens are too short to rank {SIZES[0]} keys: give at least four times as many"
        )
    counted = prompts * steps
    shape = (info.n_layers, info.heads, max(len(p) for p in found_pairs.values()))
    tables = {}
    for size, layers in sorted(found.items()):
        tables[size] = torch.zeros(shape)
        for i, x in layers.items():
            tables[size][i] = x / counted
    source = {"task": task.name, "prompts": prompts, "length": length, "steps": steps, "seed": seed}
    return ChunkTable(model_identity(model), tables, source)


def main() -> None:
    place, _ = Command(__spec__.name, "Measure which frequency chunks of a model's heads rank keys best.").read()
    model, tokenizer = place.load()
    table = measure(model, tokenizer, progress=lambda done, all_: print(f"{done} of {all_} prompts", flush=True))
    path = table.save(place.out or table_path(model))
    for size, x in table.agreement.items():
        print(f"best {size} keys: mean agreement {x.mean():.3f}, share above 0.15: {(x > 0.15).float().mean():.3f}")
    print("wrote", path)


if __name__ == "__main__":
    run(main)
