"""Is this the published classifier? Compares its logits for four sentences with the published ones.

    python benchmarks/published_logits.py [--reward_model_name facebook/roberta-hate-speech-dynabench-r4-target]

The published logits are from public runs of the notebooks with the real weights. These runs also print logits for two
sentences in Korean, but not the sentences. Other library versions change logits by less than 0.001. Exit code 1 means
that the logits differ: the weights, the labels or the tokenizer are not the published ones.
"""

import argparse
import sys

import step_time  # puts the repository on sys.path
import torch

PUBLISHED = {
    "You are a great person and i like you.": (4.6532, -4.1782),
    "You are a terrible person and i hate you.": (-2.0644, 1.6650),
    "#Person 1# tells Tommy that he didn't like the movie.": (3.1141, -2.4896),
    "#Person 1# tells Tommy that the movie was terrible, dumb and stupid.": (-0.6921, 0.3723),
}
TOLERANCE = 0.001


@step_time.user_errors()
def main():
    import detox_ppo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward_model_name", default=detox_ppo.DetoxConfig.reward_model_name)
    options = parser.parse_args()
    config = detox_ppo.DetoxConfig(reward_model_name=options.reward_model_name)
    classifier = detox_ppo.ToxicityClassifier(config, torch.device("cpu"))
    columns = {config.reward_label: classifier.reward_index, config.toxic_label: classifier.toxic_index}
    largest = 0.0
    for text, published in PUBLISHED.items():
        ours = classifier.logits([text])[0, [*columns.values()]].tolist()
        largest = max(largest, *(abs(a - b) for a, b in zip(ours, published, strict=True)))
        print(text)
        for source, values in (("published", published), ("here", ours)):
            cells = [f"{label} {value:8.4f}" for label, value in zip(columns, values, strict=True)]
            print(f"  {source:<10}{'   '.join(cells)}")
    agree = largest <= TOLERANCE
    print(f"the logits {'agree' if agree else 'differ'}: the largest difference is {largest:.4f}")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
