"""How much of a response's score can any linear value head read off the decoder's states?

    python benchmarks/value_probe.py [--responses 1200] [--adapter DIR] [options of detox_ppo.py]

Samples responses of the policy, in the small world unless --config says otherwise, fits the best linear function
(ridge regression) from the state before each token to the response's final score on two thirds of the responses, and
prints the share of variance it explains on the rest: the ceiling for a linear value head with this input, however
long it is trained. Inputs are the states after each of the decoder's layers (0: its embeddings), each as it is, as
its mean over the tokens so far, and as its sum over them.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import detox_ppo  # noqa: E402


def explained(features: torch.Tensor, target: torch.Tensor, fitted: torch.Tensor) -> float:
    """Share of the variance of target (N,) that ridge regression on features (N, d) explains outside `fitted`."""
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    target, known = target.double(), features[fitted]
    ridge = 0.1 * torch.eye(features.shape[1], dtype=torch.double)
    weights = torch.linalg.solve(known.T @ known + ridge, known.T @ target[fitted])
    error = (target - features @ weights)[~fitted]
    return float(1 - error.var() / target[~fitted].var())


@torch.no_grad()
def sample_states(policy, tokenizer, classifier, train, config, count: int):
    """Inputs by name (N, d) before every token of `count` responses, their score (N,), position and response."""
    states, scores, positions, owners = defaultdict(list), [], [], []
    caps = (config.output_min_length, config.output_max_length)
    for start in range(0, count, config.batch_size):
        batch = train.select(range(start, min(start + config.batch_size, count)))
        generators = [detox_ppo.random_stream(config.seed, detox_ppo.TRAINING, 10**6, row) for row in batch["row"]]
        responses = detox_ppo.sample_responses(policy, list(batch["input_ids"]), generators, caps, config)
        texts = [text.strip() for text in tokenizer.batch_decode(responses.tokens, skip_special_tokens=True)]
        if config.score_text == "query_response":
            texts = [classifier.join(*pair) for pair in zip(batch["dialogue"], texts, strict=True)]
        _, attention_mask = detox_ppo.pad_prompts(policy, responses.prompts)
        first = torch.full_like(responses.tokens[:, :1], policy.base.config.decoder_start_token_id)
        inputs = torch.cat([first, responses.tokens[:, :-1]], dim=1)
        decoded = policy.base.get_decoder()(
            input_ids=inputs,
            encoder_hidden_states=responses.encoder_states,
            encoder_attention_mask=attention_mask,
            output_hidden_states=True,
        )
        mask = detox_ppo.response_mask(responses.lengths, inputs.shape[1])
        so_far = torch.arange(1, inputs.shape[1] + 1)[:, None]
        for layer, hidden in enumerate(decoded.hidden_states):  # each (B, T, d)
            total = hidden.float().cumsum(dim=1)
            for name, kind in (("state", hidden.float()), ("mean so far", total / so_far), ("sum so far", total)):
                states[f"layer {layer}, {name}"].append(kind[mask])
        scores.append(torch.from_numpy(classifier.scores(texts)).repeat_interleave(responses.lengths))
        positions.append(torch.arange(inputs.shape[1]).expand(mask.shape)[mask])
        owners.append((start + torch.arange(len(batch))).repeat_interleave(responses.lengths))
    states = {name: torch.cat(parts) for name, parts in states.items()}
    return states, torch.cat(scores), torch.cat(positions), torch.cat(owners)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--responses", type=int, default=1200, help="how many to sample")
    parser.add_argument("--adapter", help="a trained adapter to probe instead of the starting one")
    arguments, options = parser.parse_known_args()
    where = (
        []
        if any(part.split("=")[0] == "--config" for part in options)
        else ["--config", "checkpoints/tiny/config.yaml"]
    )
    config = detox_ppo.parse_config([*where, *options])
    device, dtype = detox_ppo.resolve_device(config)
    policy, tokenizer = detox_ppo.load_policy(config, device, dtype)
    if arguments.adapter:
        policy.model.load_adapter(arguments.adapter, adapter_name="probed", torch_device=str(device))
        policy.model.set_adapter("probed")
    classifier = detox_ppo.HateClassifier(config, device)
    dialogues, summaries = detox_ppo.load_dialogues(config.dataset_name)
    train = detox_ppo.build_dataset(dialogues, summaries, tokenizer, config)["train"]
    states, scores, positions, owners = sample_states(
        policy, tokenizer, classifier, train, config, arguments.responses
    )
    fitted = owners % 3 != 0
    score = f"score {scores.mean():.2f}, std {scores.std():.2f}"
    print(f"{len(scores):,} tokens of {arguments.responses:,} responses; {score}")
    for name, features in states.items():
        length = features.norm(dim=1).mean()
        print(f"explained by {name} (length {length:.1f}): {explained(features, scores, fitted):.3f}")
    print(f"explained by the position alone: {explained(positions[:, None].float(), scores, fitted):.3f}")


if __name__ == "__main__":
    main()
