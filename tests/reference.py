"""The PCE layer the naive way: plain loops over images, patches, experts and choices, sentence by sentence from the
design. Slow, and meant to be obviously right. Of the package it uses nothing but the parameters of a layer.

The readings adopted where the design leaves room:

- Beyond the map everything reads zero, under every border: an expert's second convolution sees no activations in padded
  cells. Where a dropped patch would have had activations there are zeros.
- With several experts per patch the j-th choices have a map of activations of their own: under ``exchange`` a pixel's
  neighbours are those that their patches' j-th experts made.
- The gate value by which patches are dropped is p, and of equal ones the later patch is dropped.
- Padded cells keep their position features: a ``flat`` router sees them, a ``pixels`` router averages real pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5
MOMENTUM = 0.1


@dataclass(frozen=True)
class Place:
    """One patch of a batch: its image, its place in the grid, and which of its S x S cells lie on the map."""

    image: int
    row: int
    column: int
    real_height: int
    real_width: int


@dataclass
class Reference:
    """What the layer should give."""

    output: Tensor
    logits: Tensor
    choice: list[list[int]]
    weight: list[list[Tensor]]
    kept: list[list[bool]]
    load: list[int]
    capacity: int | None
    running: dict[str, Tensor] = field(default_factory=dict)


def places(batch: int, height: int, width: int, side: int) -> list[Place]:
    """The patches of a batch, row by row within an image, image by image."""
    found = []
    for image in range(batch):
        for row in range(math.ceil(height / side)):
            for column in range(math.ceil(width / side)):
                real_height = min(side, height - row * side)
                real_width = min(side, width - column * side)
                found.append(Place(image, row, column, real_height, real_width))
    return found


def window(x: Tensor, place: Place, side: int, margin: int = 0) -> Tensor:
    """The patch and ``margin`` pixels around it, ``[C, S + 2m, S + 2m]``; zeros outside the map."""
    surrounded = F.pad(x[place.image], (margin, margin + side, margin, margin + side))
    top, left = place.row * side, place.column * side
    return surrounded[:, top : top + side + 2 * margin, left : left + side + 2 * margin]


def assemble(patches: list[Tensor], where: list[Place], size: tuple[int, int, int], side: int) -> Tensor:
    """Patches ``[C, S, S]`` put back in place and cropped: ``[B, C, H, W]``."""
    batch, height, width = size
    out = patches[0].new_zeros(batch, patches[0].shape[0], height, width)
    for patch, p in zip(patches, where, strict=True):
        top, left = p.row * side, p.column * side
        real = patch[:, : p.real_height, : p.real_width]
        out[p.image, :, top : top + p.real_height, left : left + p.real_width] = real
    return out


# Position


def centre(i: int, n: int) -> float:
    """Centre of cell i of n."""
    return (2 * i + 1) / n - 1


def features(u: float, num_bands: int) -> list[float]:
    """sin(2^k pi u), cos(2^k pi u) for k = 0..K-1."""
    return [f(2**k * math.pi * u) for k in range(num_bands) for f in (math.sin, math.cos)]


def enrich(patch: Tensor, place: Place, grid: tuple[int, int], num_bands: int) -> Tensor:
    """Append the features: absolute row, absolute column, relative row, relative column."""
    side = patch.shape[-1]
    rows = []
    for i in range(side):
        row = []
        for j in range(side):
            position = [
                *features(centre(place.row, grid[0]), num_bands),
                *features(centre(place.column, grid[1]), num_bands),
                *features(centre(i, side), num_bands),
                *features(centre(j, side), num_bands),
            ]
            row.append(torch.cat([patch[:, i, j], patch.new_tensor(position)]))
        rows.append(torch.stack(row, dim=1))
    return torch.stack(rows, dim=1)


def enriched_patches(x: Tensor, side: int, num_bands: int) -> Tensor:
    """``[B*P, C + 8K, S, S]``."""
    batch, _, height, width = x.shape
    grid = (math.ceil(height / side), math.ceil(width / side))
    where = places(batch, height, width, side)
    return torch.stack([enrich(window(x, p, side), p, grid, num_bands) for p in where])


# Router


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution's cumulative probability of x."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def router_logits(router: nn.Module, x: Tensor) -> Tensor:
    """What patches are routed by: the perceptron's logits and the bias that evens out the loads."""
    return balanced(router, perceptron_logits(router, x), x)


def balanced(router: nn.Module, logits: Tensor, x: Tensor) -> Tensor:
    if router.expert_bias is None:
        return logits
    if not router.training:
        per_image = len(logits) // len(x)
        images = [logits[i * per_image : (i + 1) * per_image] for i in range(len(x))]
        return torch.cat([of - router.centring * sum(of) / per_image for of in images]) + router.expert_bias
    bias = logits.new_tensor(balancing_bias(logits.tolist(), router.top_k))
    mean = logits.mean(0)
    return logits - mean + mean.detach() + bias  # the gradient of the centred logits


def balancing_bias(logits: list[list[float]], top_k: int) -> list[float]:
    """Eight rounds in which every expert moves 0.7 of the way to where its share of the patches would choose it."""
    num_experts, share = len(logits[0]), math.ceil(len(logits) * top_k / len(logits[0]))
    if share >= len(logits) or top_k == num_experts:
        return [0.0] * num_experts
    bias = [-sum(column) / len(logits) for column in zip(*logits, strict=True)]
    for _ in range(8):
        steps = []
        for e in range(num_experts):
            leads = []  # by how much e would have to fall for a patch to leave it, or to rise for it to come
            for row in logits:
                score = [value + shift for value, shift in zip(row, bias, strict=True)]
                rivals = sorted(score[:e] + score[e + 1 :], reverse=True)
                leads.append(score[e] - rivals[top_k - 1])
            leads.sort(reverse=True)
            steps.append(0.7 * (leads[share - 1] + leads[share]) / 2)
        bias = [shift - step for shift, step in zip(bias, steps, strict=True)]
        mean = sum(bias) / num_experts
        bias = [shift - mean for shift in bias]
    return bias


def perceptron_logits(router: nn.Module, x: Tensor) -> Tensor:
    """``W2 gelu(W1 x + b1) + b2`` on each enriched patch, ``[N, E]``."""
    batch, _, height, width = x.shape
    side = router.patch_size
    w1, b1 = router.hidden.weight, router.hidden.bias
    w2, b2 = router.logits.weight, router.logits.bias
    logits = []
    seen = torch.zeros_like(x) if router.gate_input == "position" else x
    enriched = enriched_patches(seen, side, router.num_bands)
    for patch, p in zip(enriched, places(batch, height, width, side), strict=True):
        if router.gate_input == "flat":
            logits.append(w2 @ gelu(w1.flatten(1) @ patch.flatten() + b1) + b2)
        else:
            of_pixels = [
                w2 @ gelu(w1[:, :, 0, 0] @ patch[:, i, j] + b1) + b2
                for i in range(p.real_height)
                for j in range(p.real_width)
            ]
            logits.append(torch.stack(of_pixels).mean(dim=0))
    return torch.stack(logits)


def choose(logits: Tensor, top_k: int) -> list[list[int]]:
    """The k experts with the largest logits, best first."""
    return [sorted(range(len(row)), key=lambda e: -row[e])[:top_k] for row in logits.tolist()]


def softmax(logits: Tensor) -> Tensor:
    exponentials = (logits - logits.detach().amax(dim=1, keepdim=True)).exp()
    return exponentials / exponentials.sum(dim=1, keepdim=True)


def keep(choice: list[list[int]], gate: list[list[float]], num_experts: int, capacity: int | None) -> list[list[bool]]:
    """Which choices are served."""
    kept = [[True] * len(row) for row in choice]
    if capacity is None:
        return kept
    for e in range(num_experts):
        waiting = [(i, j) for i, row in enumerate(choice) for j, chosen in enumerate(row) if chosen == e]
        waiting.sort(key=lambda pair: (-gate[pair[0]][pair[1]], pair[0]))
        for i, j in waiting[capacity:]:
            kept[i][j] = False
    return kept


def gate_values(chosen_probs: list[Tensor], gate: str) -> list[Tensor]:
    """What one patch's chosen experts are multiplied by."""
    if gate != "straight_through":
        return chosen_probs
    if len(chosen_probs) == 1:
        return [(chosen_probs[0] - chosen_probs[0].detach()) + 1]
    total = sum(p.detach() for p in chosen_probs)
    return [(p - p.detach()) + p.detach() / total for p in chosen_probs]


# Experts


def batch_normalise(
    patches: list[Tensor], where: list[Place], norm: nn.Module, e: int, running: dict[str, Tensor], name: str
) -> list[Tensor]:
    """Batch normalisation over the real cells of the expert's own patches; updates ``running``."""
    mean, var = running[f"{name}.running_mean"][e].clone(), running[f"{name}.running_var"][e].clone()
    values = torch.cat(
        [patch[:, : p.real_height, : p.real_width].flatten(1) for patch, p in zip(patches, where, strict=True)],
        dim=1,
    )
    count = values.shape[1]
    if norm.training and count >= 2:
        mean = values.mean(dim=1)
        var = ((values - mean[:, None]) ** 2).mean(dim=1)
        unbiased = var.detach() * count / (count - 1)
        for key, new in (("running_mean", mean.detach()), ("running_var", unbiased)):
            old = running[f"{name}.{key}"]
            old[e] = (1 - MOMENTUM) * old[e] + MOMENTUM * new
    scale, shift = norm.weight[e], norm.bias[e]

    def normalise(patch: Tensor) -> Tensor:
        centred = patch - mean[:, None, None]
        return centred / torch.sqrt(var + EPS)[:, None, None] * scale[:, None, None] + shift[:, None, None]

    return [normalise(patch) for patch in patches]


def normalise_all(
    patches: dict[tuple[int, int], Tensor],
    where: list[Place],
    choice: list[list[int]],
    norm: nn.Module,
    running: dict[str, Tensor],
    name: str,
) -> dict[tuple[int, int], Tensor]:
    """Each pair (patch, choice) through its expert's normalisation."""
    done: dict[tuple[int, int], Tensor] = {}
    for e in range(norm.weight.shape[0]):
        pairs = [(i, j) for i, j in patches if choice[i][j] == e]
        if not pairs:
            continue
        own, own_places = [patches[pair] for pair in pairs], [where[i] for i, _ in pairs]
        outputs = batch_normalise(own, own_places, norm, e, running, name)
        done |= dict(zip(pairs, outputs, strict=True))
    return done


def run_experts(
    experts: nn.Module,
    x: Tensor,
    choice: list[list[int]],
    weight: list[list[Tensor]],
    kept: list[list[bool]],
    *,
    side: int,
    border: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted, merged outputs ``[B, C_out, H, W]`` of a given routing and the running statistics afterwards.
    Without dropout."""
    batch, _, height, width = x.shape
    size = (batch, height, width)
    where = places(batch, height, width, side)
    running = {k: v.clone() for k, v in experts.state_dict().items() if "running" in k}
    pairs = [(i, j) for i, row in enumerate(choice) for j in range(len(row)) if kept[i][j]]

    hidden = {}
    for i, j in pairs:
        w1 = experts.conv1.weight[choice[i][j]]
        if border == "zero":
            hidden[i, j] = F.conv2d(window(x, where[i], side)[None], w1, padding=1)[0]
        else:
            hidden[i, j] = F.conv2d(window(x, where[i], side, margin=1)[None], w1)[0]
    hidden = normalise_all(hidden, where, choice, experts.norm1, running, "norm1")
    hidden = {pair: gelu(h) for pair, h in hidden.items()}
    nothing = x.new_zeros(experts.conv1.weight.shape[1], side, side)
    hidden_maps = [
        assemble([hidden.get((i, j), nothing) for i in range(len(where))], where, size, side)
        for j in range(len(choice[0]))
    ]
    out = {}
    for i, j in pairs:
        w2 = experts.conv2.weight[choice[i][j]]
        if border == "exchange":
            out[i, j] = F.conv2d(window(hidden_maps[j], where[i], side, margin=1)[None], w2)[0]
        else:
            out[i, j] = F.conv2d(window(hidden_maps[j], where[i], side)[None], w2, padding=1)[0]
    out = normalise_all(out, where, choice, experts.norm2, running, "norm2")

    combined = []
    for i in range(len(where)):
        total = x.new_zeros(experts.conv2.weight.shape[1], side, side)
        for j in range(len(choice[i])):
            if kept[i][j]:
                total = total + weight[i][j] * out[i, j]
        combined.append(total)
    return assemble(combined, where, size, side), running


# The operators of `pcenet.ops`, on maps. ``expert`` has one entry per patch, -1 for nobody's.


def patch_conv2d(
    x: Tensor, weight: Tensor, base: Tensor | None, expert: list[int], side: int, neighbours: bool
) -> Tensor:
    """Each patch alone, cut out with its surroundings or without, by its expert's kernel; beyond the map lie zeros."""
    where = places(x.shape[0], *x.shape[2:], side)
    patches = []
    for e, p in zip(expert, where, strict=True):
        if e < 0:
            patches.append(x.new_zeros(weight.shape[1], side, side))
            continue
        kernel, margin = weight[e] if base is None else weight[e] + base, weight.shape[-1] // 2
        if neighbours:
            patches.append(F.conv2d(window(x, p, side, margin)[None], kernel)[0])
        else:
            real = window(x, p, side)[:, : p.real_height, : p.real_width]
            out = F.conv2d(real[None], kernel, padding=margin)[0]
            patches.append(F.pad(out, (0, side - p.real_width, 0, side - p.real_height)))
    return assemble(patches, where, (x.shape[0], *x.shape[2:]), side)


def patch_affine(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    expert: list[int],
    side: int,
    activate: bool,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """``residual + gate * act(x * scale + shift)``, patch by patch; nobody's have the residual alone."""
    where = places(x.shape[0], *x.shape[2:], side)
    patches = []
    for i, (e, p) in enumerate(zip(expert, where, strict=True)):
        patch = window(x, p, side)
        if e < 0:
            patches.append(torch.zeros_like(patch))
            continue
        if scale is not None:
            patch = patch * scale[e][:, None, None]
        if shift is not None:
            patch = patch + shift[e][:, None, None]
        if activate:
            patch = gelu(patch)
        patches.append(patch if gate is None else patch * gate[i])
    out = assemble(patches, where, (x.shape[0], *x.shape[2:]), side)
    return out if residual is None else out + residual


def expert_moments(x: Tensor, expert: list[int], side: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and biased variance of each expert's pixels on the map; zeros where there are none."""
    numbers, means, variances = [], [], []
    for e in range(num_experts):
        own = [
            window(x, p, side)[:, : p.real_height, : p.real_width].flatten(1)
            for chosen, p in zip(expert, places(x.shape[0], *x.shape[2:], side), strict=True)
            if chosen == e
        ]
        values = torch.cat(own, dim=1) if own else x.new_zeros(x.shape[1], 1)
        mean = values.sum(1) / values.shape[1]
        numbers.append(x.new_tensor(float(values.shape[1] if own else 0)))
        means.append(mean)
        variances.append(((values - mean[:, None]) ** 2).sum(1) / values.shape[1])
    return torch.stack(numbers), torch.stack(means), torch.stack(variances)


def expert_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert: list[int],
    side: int,
    running: tuple[Tensor, Tensor],
    eps: float,
    activate: bool,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Batch normalisation of each expert's pixels, by running statistics where there are fewer than two, and the
    rest."""
    scales, shifts = [], []
    numbers, means, variances = expert_moments(x, expert, side, len(weight))
    for e in range(len(weight)):
        mean, variance = (means[e], variances[e]) if numbers[e] >= 2 else (running[0][e], running[1][e])
        scales.append(weight[e] / torch.sqrt(variance + eps))
        shifts.append(bias[e] - mean * scales[e])
    return patch_affine(x, torch.stack(scales), torch.stack(shifts), expert, side, activate, gate, residual)


def patch_perceptron(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """``gelu(weight [x, row + column] + bias)`` of each pixel of a patch that lies on the map; their mean."""
    found = []
    for p in places(x.shape[0], *x.shape[2:], side):
        top, left = p.row * side, p.column * side
        pixels = [
            gelu(weight @ torch.cat((x[p.image, :, i, j], rows[i] + columns[j])) + bias)
            for i in range(top, top + p.real_height)
            for j in range(left, left + p.real_width)
        ]
        found.append(sum(pixels) / len(pixels))
    return torch.stack(found)


# The layer


def run_layer(layer: nn.Module, x: Tensor) -> Reference:
    """Everything that a `PCELayer` without dropout should give for x."""
    router = layer.router
    unbiased = perceptron_logits(router, x)
    logits = balanced(router, unbiased, x)
    num_patches, num_experts = logits.shape
    probs = softmax(logits)
    choice = choose(logits, router.top_k)
    scores = softmax(unbiased) if router.gate == "affinity" else probs
    gate = [[scores[i, e] for e in row] for i, row in enumerate(choice)]
    factor = router.capacity_factor if layer.training else router.eval_capacity_factor
    capacity = None if factor is None else math.ceil(factor * num_patches * router.top_k / num_experts)
    kept = keep(choice, [[float(p.detach()) for p in row] for row in gate], num_experts, capacity)
    weight = [gate_values(row, router.gate) for row in gate]
    output, running = run_experts(layer.experts, x, choice, weight, kept, side=router.patch_size, border=layer.border)
    if isinstance(layer.shortcut, nn.Conv2d):
        output = output + torch.einsum("oi,bihw->bohw", layer.shortcut.weight[:, :, 0, 0], x)
    elif layer.shortcut is not None:
        output = output + x
    load = [sum(e in row for row in choice) for e in range(num_experts)]
    return Reference(output, logits, choice, weight, kept, load, capacity, running)


# Comparing with it


def float64(numbers: list) -> Tensor:
    """Numbers worked out by hand, without the rounding of float32."""
    return torch.tensor(numbers, dtype=torch.float64)


def randomise(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a value that matters: no scale of 1, no shift of 0, decided routing."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in layer.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            noise = 0.5 + noise.abs()
        elif name.startswith("router."):
            noise = noise if tensor.ndim > 1 else 0.5 * noise
        elif tensor.ndim > 2:
            noise = 0.5 * noise
        else:
            noise = 1 + 0.3 * noise
        tensor.copy_(noise)
    return layer


def gradients(output: Tensor, x: Tensor, module: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Gradients of a random weighting of the output, by name; of the input under ``"x"``.

    A parameter that the output does not depend on has a gradient of zeros here; that the package gives it one at all
    is a test of its own.
    """
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    named = {"x": x, **dict(module.named_parameters())}
    found = torch.autograd.grad((output * direction.to(output)).sum(), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(named.items(), found, strict=True)
    }


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9, atol: float = 1e-10
) -> None:
    """Compare tensors by name and name the one that differs."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, check_stride=False, msg=lambda m, n=name: f"{n}: {m}"
        )
