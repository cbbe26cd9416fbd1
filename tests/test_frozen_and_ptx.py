"""R@1: whether a summary is nearest to its own dialogue."""

from detox_ppo import retrieval_at_1


def test_retrieval_at_1_by_hand():
    for texts in (
        ["the cat sat on the mat", "stocks fell again today", "he plays the violin"],
        ["고양이가 의자에 앉아 있다", "오늘 주식이 떨어졌다"],
        ["猫坐在椅子上睡觉", "今天股票又下跌了"],
    ):
        assert retrieval_at_1(texts, texts) == 1.0
        assert retrieval_at_1(texts, texts[1:] + texts[:1]) == 0.0
        assert retrieval_at_1(texts, [texts[0]] * len(texts)) <= 1 / len(texts) + 1e-9
        assert retrieval_at_1(texts, [""] * len(texts)) == 0.0
