"""One rank's share of the experts: what its loader copies, fills up with zeros and refuses."""

from __future__ import annotations

import pytest
import torch

from zemoe.integrations.engines.weights import ExpertShare

E, H, I = 2, 3, 8


def share(rank: int, ranks: int, *, fill_up: bool = False) -> ExpertShare:
    made = ExpertShare(E, H, I, rank=rank, ranks=ranks, fill_up=fill_up, dtype=torch.float64)
    for parameter in made.parameters():
        assert not parameter.requires_grad and parameter.dtype == torch.float64
        parameter.data.fill_(float("nan"))
    return made


def numbered(width: int, first: int) -> torch.Tensor:
    """[width, H], each row one number."""
    return torch.arange(first, first + width)[:, None].expand(width, H)


def load(made: ExpertShare, width: int, expert: int = 1) -> None:
    for shard, first in (("w1", 100), ("w3", 200), ("w2", 300)):
        param = made.w2_weight if shard == "w2" else made.w13_weight
        matrix = numbered(width, first)
        param.weight_loader(param, matrix.T if shard == "w2" else matrix, "name", shard_id=shard, expert_id=expert)


@pytest.mark.parametrize("fill_up", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_have_the_rows_of_gate_and_up_and_the_columns_of_down_in_order(ranks, fill_up):
    made = [share(rank, ranks, fill_up=fill_up) for rank in range(ranks)]
    for one in made:
        load(one, I)
        assert one.w13_weight[0].isnan().all() and one.w2_weight[0].isnan().all()
    gate, up = (torch.cat([one.w13_weight[1].chunk(2)[half] for one in made]) for half in (0, 1))
    assert torch.equal(gate, numbered(I, 100).double()) and torch.equal(up, numbered(I, 200).double())
    assert torch.equal(torch.cat([one.w2_weight[1] for one in made], 1), numbered(I, 300).T.double())


def test_a_smaller_matrix_is_filled_up_with_zeros_and_the_last_rank_may_have_nothing_else():
    made = [share(rank, 4, fill_up=True) for rank in range(4)]
    for one in made:
        load(one, 5)
    gates = [one.w13_weight[1].chunk(2)[0][:, 0].tolist() for one in made]
    assert gates == [[100, 101], [102, 103], [104, 0], [0, 0]]
    assert [one.w2_weight[1, 0].tolist() for one in made] == [[300, 301], [302, 303], [304, 0], [0, 0]]


@pytest.mark.parametrize("fill_up", [False, True])
@pytest.mark.parametrize("shape", [(I + 1, H), (I, H + 1), (I, H, 1), (H, I)])
def test_a_matrix_of_another_shape_is_refused_by_name(shape, fill_up):
    made = share(0, 2, fill_up=fill_up)
    with pytest.raises(ValueError) as caught:
        made.weight_loader(made.w13_weight, torch.zeros(shape), "gate", "w1", 0)
    assert str(caught.value) == f"gate must have shape (8, 3), got {shape}"
    assert made.w13_weight.isnan().all()


def test_a_smaller_matrix_is_refused_where_it_is_not_to_be_filled_up():
    made = share(0, 2)
    with pytest.raises(ValueError, match=r"down must have shape \(3, 8\), got \(3, 5\)"):
        made.weight_loader(made.w2_weight, torch.zeros(H, 5), "down", "w2", 0)


def test_an_unknown_shard_is_refused_and_success_is_told_on_request():
    made = share(0, 1)
    with pytest.raises(ValueError, match="shard_id must be 'w1', 'w2' or 'w3', got 'w13' for name"):
        made.weight_loader(made.w13_weight, torch.zeros(I, H), "name", "w13", 0)
    assert made.weight_loader(made.w13_weight, torch.zeros(I, H), "name", "w1", 0) is None
    assert made.weight_loader(made.w13_weight, torch.zeros(I, H), "name", "w1", 0, return_success=True) is True
