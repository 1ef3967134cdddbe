"""The token that is to blame for an activation that is not finite."""

import torch

from epmq_gptq.method.nonfinite import Origin, Peaks, peaks


def test_peaks_are_of_either_sign_and_show_what_is_not_finite():
    X = torch.tensor([[[1.0, -3.0], [2.0, 0.5]], [[float("nan"), 9.0], [float("-inf"), 9.0]]])
    found = peaks(X)
    assert found[0].tolist() == [3.0, 2.0]
    assert found[1].isnan().tolist() == [True, False] and found[1, 1] == float("inf")


def test_the_first_bad_token_of_the_expert_in_question():
    seen, X = Peaks(), torch.ones(2, 3, 4)
    seen.add("math", 0, X, None)
    bad = X.clone()
    bad[1, 2, 0] = float("nan")
    seen.add("math", 1, bad, torch.ones(2, 3, dtype=torch.bool))
    seen.add("code", 2, bad, None)
    assert seen.first_bad("math")[:3] == (1, 1, 2) and seen.first_bad("code")[:3] == (2, 1, 2)
    assert seen.first_bad("poetry") is None


def test_in_words():
    experts, ids = ["code", "math", "math"], torch.tensor([[5, 6, 7]])
    known = Origin(2, 0, 1, 4.0).told("math", experts, ids)
    assert known == "token 1 (id 6) of row 0 of batch 1 of `math`"
    assert (
        Origin(1, 0, 9, 4.0).told("math", experts, ids) == "token 9 of row 0 of batch 0 of `math`"
    )
    assert Origin(1, None, 4, 4.0).told("math", experts) == "token 4 of batch 0 of `math`"
