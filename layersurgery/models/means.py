"""Hold the mean over tokens of what each branch adds to the residual stream, and put it in the place of a branch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..atomic_io import atomic_file
from ..errors import PlanError, SourceError, UnsupportedEditError
from ..plans.visit import BRANCHES, Branch, Visit
from .quantized import is_quantized
from .unsupported import MEASURE_MEANS

if TYPE_CHECKING:
    from .skipped_branch import SkipSpec

_FORMAT = "layersurgery means"
# By so many of its weights, a block is recognized. Those of two blocks differ by more than half of their length; a
# change of the data type, or light training, changes them by some hundredths.
_SAMPLED, _LARGEST_DIFFERENCE = 16, 0.1


@dataclass(frozen=True, slots=True)
class BranchMean:
    """Hold the mean of one branch of one block.

    Attributes:
        vector: the mean over tokens of what the branch adds to the stream, float32.
        path: path, within the block, of the module whose output is replaced.
        scale: the factor by which the block multiplies that module's output.
        samples: some numbers of the weights with which the branch writes the stream, by their names in the block; the
            block is recognized by them. Weights that were not at hand are left out.
    """

    vector: torch.Tensor = field(compare=False)
    path: str
    scale: float = 1.0
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Means:
    """Hold the mean over tokens of what each branch of a model adds to the residual stream.

    Attributes:
        model: the model's name.
        depth: number of blocks of the model.
        width: size of the residual stream.
        tokens: number of tokens that the means are over.
        vectors: for each block and branch that could be measured, its mean.
        errors: for each block that could not be measured, the reason.
        text: what the means were measured on, and without which tokens.
    """

    model: str
    depth: int
    width: int
    tokens: int
    vectors: Mapping[tuple[int, Branch], BranchMean] = field(compare=False)
    errors: Mapping[int, str] = field(default_factory=dict, compare=False)
    text: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __getitem__(self, where: tuple[int, Branch]) -> torch.Tensor:
        """Return the mean of a branch, such as `means[20, "mlp"]`, float32."""
        return self.vectors[where].vector

    def of_block(self, block: int) -> torch.Tensor:
        """Return the mean of what a whole block adds: the sum over its branches."""
        return torch.stack([self[block, branch] for branch in BRANCHES if (block, branch) in self.vectors]).sum(0)

    @property
    def fingerprint(self) -> str:
        """Return a hash of the vectors and of where they are put."""
        digest = hashlib.sha256(f"{self.depth} {self.width}".encode())
        for where, mean in sorted(self.vectors.items()):
            digest.update(f"{where} {mean.path} {mean.scale!r}".encode())
            digest.update(mean.vector.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def merged(self, other: Means) -> Means:
        """Return the means over the tokens of both, of the same model.

        Raises:
            PlanError: they are of different models.
        """
        if (self.model, self.depth, self.width) != (other.model, other.depth, other.width) or set(self.vectors) != set(
            other.vectors
        ):
            raise PlanError(f"means of {self.model} and of {other.model} cannot be merged: the models differ")
        for (block, branch), mean in other.vectors.items():
            if (self.vectors[block, branch].path, self.vectors[block, branch].scale) != (mean.path, mean.scale):
                raise PlanError(f"means of {self.model} and of {other.model} cannot be merged: the models differ")
            self.check_samples(block, branch, mean.samples)
        total = self.tokens + other.tokens
        vectors = {
            where: replace(
                mean,
                vector=((mean.vector.double() * self.tokens + other[where].double() * other.tokens) / total).float(),
            )
            for where, mean in self.vectors.items()
        }
        return replace(self, tokens=total, vectors=vectors, text={"merged": [dict(self.text), dict(other.text)]})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the means to one safetensors file, with what they were measured on in its metadata."""
        from safetensors.torch import save_file

        record = {
            "format": _FORMAT,
            "model": self.model,
            "depth": self.depth,
            "width": self.width,
            "tokens": self.tokens,
            "text": dict(self.text),
            "errors": {str(block): reason for block, reason in self.errors.items()},
            "places": {
                _name(where): [mean.path, mean.scale, dict(mean.samples)] for where, mean in self.vectors.items()
            },
        }
        tensors = {_name(where): mean.vector.contiguous() for where, mean in self.vectors.items()}
        with atomic_file(Path(path)) as partial:
            save_file(tensors, partial, {_FORMAT: json.dumps(record)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Means:
        """Read means from a file that `save` has written.

        Raises:
            SourceError: the file does not exist, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                record = json.loads((file.metadata() or {})[_FORMAT])
                vectors = {
                    _where(name): BranchMean(file.get_tensor(name), path, scale, dict(samples))
                    for name, (path, scale, samples) in record["places"].items()
                }
        except FileNotFoundError:
            raise SourceError(f"{path} does not exist; {MEASURE_MEANS}") from None
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise SourceError(f"{path} holds no means of branches ({error}); {MEASURE_MEANS}") from error
        errors = {int(block): reason for block, reason in record["errors"].items()}
        return cls(record["model"], record["depth"], record["width"], record["tokens"], vectors, errors, record["text"])

    def check(self, depth: int) -> None:
        """Refuse a model of another depth.

        Raises:
            PlanError: the means are of another model.
        """
        if depth != self.depth:
            raise PlanError(
                f"the means are of a model of {self.depth} blocks ({self.model}), and this one has {depth}; measure "
                "the means of this model. Inside operate, a model has other blocks: make one plan of all edits"
            )

    def check_block(self, number: int, block: nn.Module) -> None:
        """Refuse a block that has other weights than the one which the means are of.

        An edit can put another block at the same number. Weights that are offloaded or quantized are not compared.

        Raises:
            PlanError: the means are of another block.
        """
        for branch in BRANCHES:
            if (mean := self.vectors.get((number, branch))) is not None:
                self.check_samples(number, branch, weight_samples(block, mean.samples))

    def check_samples(self, number: int, branch: Branch, samples: Mapping[str, Sequence[float]]) -> None:
        """Refuse a block of which a sample of weights differs from that of the block which the means are of.

        Args:
            number: the block's number.
            branch: the branch.
            samples: some numbers of weights, by their names in the block; others are not compared.

        Raises:
            PlanError: the means are of another block.
        """
        for name, known in self.vectors[number, branch].samples.items():
            found, size = samples.get(name, known), math.hypot(*known)
            if len(known) != len(found) or (size and math.dist(known, found) > _LARGEST_DIFFERENCE * size):
                raise PlanError(
                    f"the means of block {number} were measured with other weights than its {branch} has now; measure "
                    "the means of this model. Inside operate, and after operate_, a number may be that of another "
                    "block: make one plan of all edits"
                )

    def specs(self, skips: tuple[SkipSpec, ...], block: int, branch: Branch) -> tuple[SkipSpec, ...]:
        """Return the specs of a skipped branch that add the branch's mean instead of nothing.

        Args:
            skips: the specs that skip the branch.
            block: the block's number.
            branch: the branch.

        Raises:
            UnsupportedEditError: the branch has no mean.
            PlanError: the means are of another model.
        """
        mean = self.vectors.get((block, branch))
        if mean is None:
            reason = self.errors.get(block, "nothing was captured")
            raise UnsupportedEditError(f"the mean of block {block}'s {branch} is not known: {reason}")
        if [skip.width for skip in skips if skip.path == mean.path] != [len(mean.vector)]:
            raise PlanError(
                f"the means do not fit block {block}: in them, its {branch} writes {len(mean.vector)} channels at "
                f"{mean.path}; measure the means of this model"
            )
        vector = mean.vector if mean.scale == 1 else (mean.vector.double() / mean.scale).float()
        return tuple(replace(skip, mean=vector, savable=False) if skip.path == mean.path else skip for skip in skips)


def weight_samples(block: nn.Module, names: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Return some numbers of a block's weights by their names, without those that are offloaded, quantized or gone."""
    samples = {}
    for name in names:
        try:
            owner, weight = block.get_submodule(name.rpartition(".")[0]), block.get_parameter(name)
        except AttributeError:  # another block stands there, or a skipped branch
            continue
        if not (weight.is_meta or is_quantized(owner)):
            samples[name] = sample_of(weight)
    return samples


def sampled_parameters(block: nn.Module, outputs: Iterable[str], path: str) -> list[str]:
    """Return the names of the weights by which a branch of a block is recognized.

    They are the matrices that write the stream, and the weight of a norm behind them: an edit that scales the branch,
    or turns heads or neurons off, changes one of these.

    Args:
        block: the block.
        outputs: names of the parameters that write the stream.
        path: the module whose output the mean replaces.
    """
    module, known = block.get_submodule(path), dict(block.named_parameters())
    own = [f"{path}.{name}" if path else name for name, _ in module.named_parameters()]
    matrices = [name for name in outputs if known[name].ndim > 1]
    if not matrices:  # which weights write the stream is not known
        matrices = [name for name in own if known[name].ndim > 1][:1]
    is_norm = not any(module.children()) and all(known[name].ndim == 1 for name in own)
    return [*matrices, *(name for name in own if is_norm and name.endswith("weight"))]


@torch.no_grad()
def sample_of(weight: torch.Tensor) -> tuple[float, ...]:
    """Return some of a tensor's numbers, evenly spaced."""
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, len(flat) - 1, _SAMPLED, dtype=torch.float64).long()
    return tuple(flat[places.to(flat.device)].float().tolist())


def mean_specs(
    skips: Mapping[Branch, tuple[SkipSpec, ...]], visit: Visit, means: Means | None, depth: int
) -> list[SkipSpec]:
    """Return the specs of the branches of a visit that add their mean.

    Args:
        skips: the specs that skip each branch of the block.
        visit: the visit.
        means: the means of the model.
        depth: number of blocks of the model.

    Raises:
        PlanError: there are no means, or they are of another model.
        UnsupportedEditError: a branch has no mean.
    """
    if not visit.mean:
        return []
    if means is None:
        raise PlanError(f"{visit} adds a mean that is not known; {MEASURE_MEANS}")
    means.check(depth)
    # A whole block adds the mean of the branches that it has.
    branches = [branch for branch in visit.mean if skips[branch] or visit.mean != BRANCHES]
    return [spec for branch in branches for spec in means.specs(skips[branch], visit.block, branch)]


def as_means(value: Any) -> Means | None:
    """Return means, or those of a file; None for None.

    Raises:
        PlanError: it is neither.
        SourceError: the file does not exist, or holds something else.
    """
    if value is None or isinstance(value, Means):
        return value
    if isinstance(value, str | os.PathLike):
        return Means.load(value)
    raise PlanError(f"means are given as measured by measure_means, or as their file, not as {type(value).__name__}")


def _name(where: tuple[int, Branch]) -> str:
    return f"{where[0]}.{where[1]}"


def _where(name: str) -> tuple[int, Branch]:
    block, _, text = name.partition(".")
    (branch,) = (branch for branch in BRANCHES if branch == text)
    return int(block), branch
