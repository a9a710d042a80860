"""How a teacher's distribution becomes a few weighted ids: `threshold`, `top_k`, `sampled`.

Shape suffixes: R rows (positions that count), V vocabulary, N entries of all rows in turn,
C head candidates, M tail draws, G blocks of J = 64 vocabulary entries. Logarithms are natural.

A row's result depends on its own logits and number alone, to the last bit: not on the rows beside
it, nor on threads.
"""

import torch
from torch import Tensor

from distill.config import SampledConfig, TargetsConfig, ThresholdConfig, TopKConfig
from distill.errors import TeacherError
from distill.masses import BLOCK, Masses, ids_at, likeliest, make_masses, rows_at_once, top_k
from distill.targets import SparseTargets, concatenate
from distill.uniforms import streams

_HELD_ENTRIES = 1 << 23
"""Probabilities that a CPU holds for its draws: 32 MB, used again for the next rows."""

_NOTHING = 2.0**-100
"""A tail of less mass is none: float32 could not carry it through a cache."""


class NonFiniteRowError(TeacherError):
    """Logits are NaN or infinite; whoever holds the blocks says of which block and row."""

    def __init__(self, row: int) -> None:
        super().__init__(f"logits are NaN or infinite in row {row}")
        self.row = row


def draw(logits_RV: Tensor, uniforms_R: Tensor, config: TargetsConfig) -> SparseTargets:
    """Turn teacher logits into sparse targets of the configured kind.

    Args:
        logits_RV: Logits over the true vocabulary, of any float dtype; computed with in float32.
        uniforms_R: One number in [0, 1) a row, float64 (see `row_uniforms`).
        config: Kind, its parameters and the temperature.

    Raises:
        NonFiniteRowError: logits are NaN or infinite.
        TeacherError: k is not below the vocabulary size.
    """
    num_rows, vocab_size = logits_RV.shape
    require_k_below(config, vocab_size)
    parts = []
    at_once = rows_at_once(logits_RV, _HELD_ENTRIES)
    for first in range(0, max(1, num_rows), at_once):
        rows = slice(first, first + at_once)
        masses = make_masses(logits_RV[rows], config.temperature)
        if not bool(torch.isfinite(masses.entropy_R).all()):
            row = int((~torch.isfinite(masses.entropy_R)).nonzero()[0, 0])
            raise NonFiniteRowError(first + row)
        if isinstance(config, TopKConfig):
            parts.append(_draw_top_k(masses, config))
        elif isinstance(config, SampledConfig):
            parts.append(_draw_sampled(masses, uniforms_R[rows], config))
        else:
            uniforms_here_R = uniforms_R[rows].to(logits_RV.device)
            parts.append(_draw_threshold(masses, uniforms_here_R, config))
    return concatenate(parts)


def require_k_below(config: TargetsConfig, vocab_size: int) -> None:
    """Refuse `top_k` targets that would hold the whole vocabulary.

    Raises:
        TeacherError: k is not below the vocabulary size.
    """
    if isinstance(config, TopKConfig) and config.k >= vocab_size:
        raise TeacherError(
            f"targets.k is {config.k}, but the teacher has {vocab_size} tokens: k must be smaller"
        )


def _draw_top_k(masses: Masses, config: TopKConfig) -> SparseTargets:
    num_rows, total_R = len(masses.entropy_R), masses.total_R
    normalisers_RJ = None
    if config.also_temperatures:
        sums = []
        for temperature in config.also_temperatures:
            power = config.temperature / temperature
            powers_R = (masses.inside_RGJ**power).sum(-1).sum(-1)
            sums.append(powers_R.log() - power * total_R.log())
        normalisers_RJ = torch.stack(sums, dim=1)
    top_RK, ids_RK = top_k(masses, config.k)
    # The rest is summed itself: 1 - sum(top-k) cancels once the top-k hold nearly all mass.
    rows_N = torch.arange(num_rows, device=ids_RK.device).repeat_interleave(config.k)
    masses.take_out(rows_N, ids_RK.flatten())
    counts_R = torch.full((num_rows,), config.k, dtype=torch.int64, device=ids_RK.device)
    return SparseTargets(
        ids_N=ids_RK.reshape(-1),
        weights_N=(top_RK / total_R[:, None]).reshape(-1),
        counts_R=counts_R,
        num_head_R=counts_R.clone(),
        tail_mass_R=masses.total_R / total_R,
        entropy_R=masses.entropy_R,
        log_normalisers_RJ=normalisers_RJ,
        temperature=config.temperature,
        has_bucket=True,
    )


def _draw_sampled(masses: Masses, uniforms_R: Tensor, config: SampledConfig) -> SparseTargets:
    """Draw ids with replacement; an id drawn c times weighs c / draws, which is unbiased.

    Method source: Anshumann et al. 2025, arXiv:2503.16870 (RS-KD, with its proposal at tau = 1).
    """
    device, num_rows = masses.sums_RG.device, len(masses.sums_RG)
    cumulative_RG = masses.sums_RG.cumsum(-1, dtype=torch.float64)
    uniforms_RM = streams(uniforms_R, config.draws).to(device).sort(dim=-1).values
    ids_RM = ids_at(uniforms_RM * cumulative_RG[:, -1:], cumulative_RG, masses.inside_RGJ)
    is_new_RM = torch.ones_like(ids_RM, dtype=torch.bool)
    is_new_RM[:, 1:] = ids_RM[:, 1:] != ids_RM[:, :-1]
    places = is_new_RM.flatten().nonzero()[:, 0]
    drawn_N = torch.diff(places, append=places.new_tensor([ids_RM.numel()]))
    rows_N, ids_N = places // config.draws, ids_RM.flatten()[places]

    # The likeliest id stands first in its row, drawn or not: students are compared with it.
    top_R = likeliest(masses)
    is_top_N = ids_N == top_R[rows_N]
    top_drawn_R = drawn_N.new_zeros(num_rows).index_add(0, rows_N[is_top_N], drawn_N[is_top_N])
    rows = torch.cat([torch.arange(num_rows, device=device), rows_N[~is_top_N]])
    order = rows.argsort(stable=True)
    drawn = torch.cat([top_drawn_R, drawn_N[~is_top_N]])[order]
    return SparseTargets(
        ids_N=torch.cat([top_R, ids_N[~is_top_N]])[order],
        weights_N=drawn.float() / config.draws,
        counts_R=torch.bincount(rows, minlength=num_rows),
        num_head_R=torch.ones_like(top_R),
        tail_mass_R=torch.zeros_like(masses.entropy_R),
        entropy_R=masses.entropy_R,
        temperature=config.temperature,
    )


def _draw_threshold(masses: Masses, uniforms_R: Tensor, config: ThresholdConfig) -> SparseTargets:
    """Keep every id with probability >= tau, and draw the rest without replacement, unbiased.

    With r the tail mass and m = ceil(r / tau), m tail ids are drawn with inclusion probability
    m t_j / r and weigh r / m each: the expected weights are the probabilities, every row sums to 1,
    and the trace of the covariance is sum_tail t_j (r / m - t_j). An id with t_j > r / m (or
    equal but for rounding) joins the head; so does the likeliest id always. Systematic sampling in
    id order: first-order inclusion, on which alone mean and trace depend, is exact.

    Method source: Cohen et al. 2008, arXiv:0803.0473 (VarOpt); for KL, Barnes et al. 2024,
    arXiv:2402.14925.
    """
    total_R = masses.total_R
    ids_RC, weights_RC, num_head_R, num_tail_R = _choose_head(masses, config.tau)
    is_head_RC = torch.arange(ids_RC.shape[1], device=ids_RC.device) < num_head_R[:, None]
    masses.take_out(is_head_RC.nonzero()[:, 0], ids_RC[is_head_RC])

    cumulative_RG = masses.sums_RG.cumsum(-1, dtype=torch.float64)
    tail_R = cumulative_RG[:, -1] / total_R
    num_tail_R = num_tail_R.clamp(min=1).where(tail_R > _NOTHING, 0)
    draws = torch.arange(int(num_tail_R.max()), device=total_R.device)
    places_RM = (uniforms_R[:, None] + draws) / num_tail_R.clamp(min=1)[:, None]
    # Rounding may put the last place on the very end, where no id is.
    places_RM = places_RM.clamp(max=1 - 2**-52) * cumulative_RG[:, -1:]
    tail_ids_RM = ids_at(places_RM, cumulative_RG, masses.inside_RGJ)
    is_tail_RM = draws < num_tail_R[:, None]
    share_R = (tail_R / num_tail_R.clamp(min=1)).float()

    kept = torch.cat([is_head_RC, is_tail_RM], dim=1)
    ids = torch.cat([ids_RC, tail_ids_RM], dim=1)
    weights = torch.cat([weights_RC.float(), share_R[:, None].expand(is_tail_RM.shape)], dim=1)
    return SparseTargets(
        ids_N=ids[kept],
        weights_N=weights[kept],
        counts_R=num_head_R + num_tail_R,
        num_head_R=num_head_R,
        tail_mass_R=tail_R.where(num_tail_R > 0, 0).float(),
        entropy_R=masses.entropy_R,
        temperature=config.temperature,
    )


def _choose_head(masses: Masses, tau: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Candidate ids and probabilities by falling probability [R, C]; sizes of head and tail [R].

    Only ids with t >= tau / 2 (and the likeliest) can be: for m >= 2, r > (m - 1) tau and so
    r / m >= tau / 2; for m = 1 no t_j exceeds r.
    """
    inside_RGJ, total_R = masses.inside_RGJ, masses.total_R
    floor_R = (total_R * (tau / 2)).minimum(masses.largest_RG.amax(-1))
    rows, blocks = (masses.largest_RG >= floor_R[:, None]).nonzero(as_tuple=True)
    found, within = (inside_RGJ[rows, blocks] >= floor_R[rows, None]).nonzero(as_tuple=True)
    rows, ids = rows[found], blocks[found] * BLOCK + within
    counts_R = torch.bincount(rows, minlength=len(total_R))
    place = torch.arange(len(rows), device=rows.device) - (counts_R.cumsum(0) - counts_R)[rows]
    weights_RC = total_R.new_zeros(len(total_R), int(counts_R.max()), dtype=torch.float64)
    ids_RC = ids.new_zeros(weights_RC.shape)
    weights_RC[rows, place] = inside_RGJ.flatten(1)[rows, ids].double() / total_R[rows]
    ids_RC[rows, place] = ids
    weights_RC, order_RC = weights_RC.sort(dim=-1, descending=True, stable=True)
    ids_RC = ids_RC.gather(1, order_RC)

    # A head that ends here is enough if the next candidate is below tau and not above r / m (by
    # more than rounding, else it could be drawn twice).
    rest_RC = (1 - weights_RC.cumsum(-1)).clamp(min=0)
    num_tail_RC = (rest_RC / tau).ceil()
    next_RC = torch.cat([weights_RC[:, 1:], weights_RC.new_zeros(len(weights_RC), 1)], dim=1)
    share_RC = rest_RC / num_tail_RC.clamp(min=1)
    enough_RC = (next_RC < tau) & (next_RC <= share_RC * (1 - 1e-6))
    last_R = counts_R[:, None] - 1
    enough_RC.scatter_(1, last_R, True)
    end_R = enough_RC.int().argmax(-1)
    num_tail_R = num_tail_RC.gather(1, end_R[:, None])[:, 0].long()
    return ids_RC, weights_RC, end_R + 1, num_tail_R
