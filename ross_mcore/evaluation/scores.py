"""Scores of judged answers. A bad picture, or an answer in which nothing was recognised, is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ross_mcore.evaluation.answers import YES
from ross_mcore.evaluation.items import Judged, Scores, by_category, groups_of, percent

PERCEPTION = frozenset(
    ("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene")
)
COGNITION = frozenset(("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"))
"""MME's subtasks, by VLMEvalKit's names (vlmeval/dataset/utils/yorn.py:MME_rating)."""


def accuracy(judged: Sequence[Judged]) -> Scores:
    """Share of right answers."""
    return {"accuracy": percent(sum(each.is_right for each in judged), len(judged))}


def yes_no(judged: Sequence[Judged]) -> Scores:
    """Accuracy, and precision, recall and F1 of yes (LLaVA's eval_pope.py, VLMEvalKit's POPE_rating)."""
    said = sum(each.read == YES for each in judged)
    true = sum(YES in each.item.answers for each in judged)
    both = sum(each.read == YES and each.is_right for each in judged)
    precision, recall = percent(both, said), percent(both, true)
    return {
        **accuracy(judged),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes ratio": percent(said, len(judged)),
    }


def pairs(judged: Sequence[Judged]) -> Scores:
    """MMVP: share of pairs with both answers right, and of right answers."""
    return {"pair accuracy": _whole_groups(judged), **accuracy(judged)}


def circular(judged: Sequence[Judged]) -> Scores:
    """MMBench: share of questions that are right with every order of their options, and of right answers."""
    return {"circular accuracy": _whole_groups(judged), **accuracy(judged)}


def mme(judged: Sequence[Judged]) -> Scores:
    """MME: accuracy, accuracy+ (both questions of a picture), and the sum of both over the subtasks."""
    subtasks = {
        name: accuracy(some)["accuracy"] + _whole_groups(some) for name, some in by_category(judged).items()
    } or {"": accuracy(judged)["accuracy"] + _whole_groups(judged)}
    found: Scores = {**accuracy(judged), "accuracy+": _whole_groups(judged), "score": sum(subtasks.values())}
    if len(subtasks) > 1:
        found["perception"] = sum(score for name, score in subtasks.items() if name in PERCEPTION)
        found["cognition"] = sum(score for name, score in subtasks.items() if name in COGNITION)
    return found


def _whole_groups(judged: Sequence[Judged]) -> float:
    groups = groups_of(judged)
    return percent(sum(all(each.is_right for each in group) for group in groups), len(groups))


def captions(judged: Sequence[Judged]) -> Scores:
    """Corpus BLEU-4 and chrF of sacrebleu, 0 to 100, against all references; share of captions equal to one."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    texts = [each.prediction.get("text", "") for each in judged]
    most = max(len(each.item.answers) for each in judged)
    references = [["".join(each.item.answers[n : n + 1]) for each in judged] for n in range(most)]  # "": no more
    return {
        "BLEU-4": BLEU().corpus_score(texts, references).score,
        "chrF": CHRF().corpus_score(texts, references).score,
        "exact": accuracy(judged)["accuracy"],
    }


def fidelity(judged: Sequence[Judged]) -> Scores:
    """Means of PSNR in dB and SSIM over the pictures; bad pictures are left out."""
    good = [each.prediction for each in judged if not each.is_bad]
    return {name: fmean(each[key] for each in good) if good else 0.0 for name, key in FIDELITY.items()}


FIDELITY = {"PSNR": "psnr", "SSIM": "ssim"}
