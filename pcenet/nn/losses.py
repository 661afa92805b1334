"""Auxiliary losses: scalars that keep a router sound, from its logits before any dropping."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pcenet.nn.processes import sum_over_processes
from pcenet.nn.routing import Routing


def z_loss(routing: Routing, squared: bool = True) -> Tensor:
    """``mean_i (logsumexp_j l_ij)^2`` of a routing's logits (ST-MoE, Zoph et al., 2022, equation 5).

    Args:
        routing: whose logits count.
        squared: False leaves the square out, the formula as the specification wrote it. That loss is unbounded below:
            a constant added to every logit changes no routing and lowers it for ever.
    """
    log_partition = routing.logits.logsumexp(dim=1)
    return (log_partition.square() if squared else log_partition).mean()


def load_balance_loss(routing: Routing, load: Tensor | None = None) -> Tensor:
    """``E * sum_e mean(p_e) * mean(a_e) / k`` (Switch Transformer, Fedus et al., 2021, equation 4).

    1 for a uniform router, E for a collapsed one with k = 1. The assignment a, of before dropping, has no gradient.

    Args:
        routing: of the patches whose probabilities p, at the router's temperature, count.
        load: ``[E]``, choices per expert; None: those of the routing. Given is the load of a larger batch of which this
            is a part: the mean over equal parts is then the loss of the whole.
    """
    load = routing.expert_counts if load is None else load
    return len(load) * (routing.probs.mean(dim=0) * load.to(routing.probs.dtype) / load.sum()).sum()


class AuxTerms(NamedTuple):
    """The unweighted auxiliary losses of a network, scalars: each summed over its layers."""

    balance: Tensor
    z: Tensor


def aux_terms(records: Mapping[str, Sequence[Routing]], synchronised: bool = False) -> AuxTerms:
    """The terms of `aux_loss` apart, for logging and for weights of your own; zeros for no records.

    Args:
        records: as there.
        synchronised: count loads over all processes of torch's process group, each of which must ask at the same point.
            The mean of their losses, and so the mean of their gradients, is then that of one large batch.
    """
    terms: tuple[list[Tensor], list[Tensor]] = ([], [])
    for routings in records.values():
        loads = [routing.expert_counts for routing in routings]
        if synchronised:
            loads = list(sum_over_processes(torch.stack(loads)))
        for routing, load in zip(routings, loads, strict=True):
            terms[0].append(load_balance_loss(routing, load) / len(routings))
            terms[1].append(z_loss(routing) / len(routings))
    # Where layers are on different devices, a sum goes on to the next one's.
    return AuxTerms(*(_total(own) for own in terms))


def _total(terms: Sequence[Tensor]) -> Tensor:
    if not terms:
        return torch.zeros(())
    return functools.reduce(lambda total, term: term + total.to(term.device), terms)


def aux_loss(
    records: Mapping[str, Sequence[Routing]], balance: float = 0.01, z: float = 0.001, synchronised: bool = False
) -> Tensor:
    """What a training loop adds to its task loss: ``sum over layers of (balance * load balance + z * z-loss)``.

    Args:
        records: layer name to the Routings of that layer, as `record_routing` gives them; where a layer ran several
            times its mean is taken.
        balance: weight of the load balance loss.
        z: weight of the z-loss.
        synchronised: see `aux_terms`.

    Returns:
        A scalar; 0 for no records, so that one training loop serves PCE networks and dense ones.
    """
    terms = aux_terms(records, synchronised)
    return _total([weight * term for weight, term in ((balance, terms.balance), (z, terms.z)) if weight])
