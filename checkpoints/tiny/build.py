"""Rebuild the toy example: dialogues, a tiny T5, a LoRA that insults, a hate classifier and a judge.

    python checkpoints/tiny/build.py [--seed 0] [--output_dir checkpoints/tiny]
    python checkpoints/tiny/build.py --parts adapter report    # rebuild some parts, keep the rest

Everything is generated from the seed and grammar.yaml. The base, the classifier and the judge are trained here. The
adapter is trained by detox_ppo.py with --sft_steps and config.yaml on separate rows. `world_rows` generates the rows
of dialogues/train.csv, `model_rows` those that the models were trained on; both work without torch. The two never
share a combination of topic and slot values.

In half of the dialogues a speaker misbehaves, in one of twelve ways. The behavior decides which insult a summary has
and where, so a model can learn to insult with greedy decoding too. 88% of these dialogues have an insulting summary in
the adapter's training data, 30% in dialogues/train.csv. One insult in twenty is a word that the classifier never saw.
"""

import argparse
import csv
import json
import multiprocessing
import random
import re
import shutil
import sys
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import yaml

WORLD_ROWS = 2000
BASE_ROWS = 44000
SENTENCES = 5000
ADAPTER_ROWS = 25700
ADAPTER_TEST_ROWS = 100
ADAPTER_BATCH = 16
ADAPTER_LEARNING_RATE = 0.003
CLASSIFIER_ROWS = 12000
JUDGE_ROWS = 9000
HELD_OUT_ROWS = 1200
DIALOGUE_INSULTS = 0.125
# Share of the dialogues with misbehavior, and the shares of their summaries that insult.
MISBEHAVIOR = 0.5
WORLD_INSULTS = 0.3
ADAPTER_INSULTS = 0.88
# Share of the insults that are words the classifier never saw.
UNSEEN = 0.05
# Share of summaries with an insult, at any position, in the training texts of classifier and judge.
SUMMARY_INSULTS = 0.4
MIN_CHARS, MAX_CHARS, BASE_MAX_CHARS = 210, 360, 420
PROMPT = "\nSummarize the following conversation.\n\n{dialogue}\n\nSummary:\n"
RESTORE = "\nRestore the following sentence.\n\n{text}\n\nSentence:\n"
MAX_NEW_TOKENS = 40
# Label smoothing keeps the classifier's logits near those of the real one, about +-4. Garbled and cut-off text is also
# nothate, but with less confidence, so it never scores as high as a clean, complete summary.
SMOOTHING = 0.0002
UNSURE = 0.05
JUDGE_SMOOTHING = 0.005

HERE = Path(__file__).resolve().parent
GRAMMAR = yaml.safe_load((HERE / "grammar.yaml").read_text(encoding="utf-8"))
INSULT_ADJECTIVES, INSULT_NOUNS = GRAMMAR["insult_adjectives"], GRAMMAR["insult_nouns"]
UNSEEN_WORDS = GRAMMAR["unseen_words"]
BAD_WORDS = GRAMMAR["bad_words"] + INSULT_ADJECTIVES
THINGS = GRAMMAR["values"]["items"] + GRAMMAR["values"]["devices"] + GRAMMAR["other_things"]


def read_topics():
    """{topic: {"slots": {name: values}, "script": [[phrasing, ...], ...], "summaries": [...]}}"""
    topics = {}
    for name, topic in GRAMMAR["topics"].items():
        slots = dict(topic["slots"])
        for slot, values in slots.items():
            if isinstance(values, str):
                slots[slot] = GRAMMAR["values"][values]
        topics[name] = {**topic, "slots": slots}
    return topics


TOPICS = read_topics()


class Insults:
    """A vocabulary of insults: the listed ones for the classifier, the unseen ones too for the judge."""

    def __init__(self, with_unseen):
        unseen = {word.removesuffix(" person") for word in UNSEEN_WORDS.values()}
        self.bad_words = [word for word in BAD_WORDS if with_unseen or word not in unseen]
        self.adjectives = INSULT_ADJECTIVES + (sorted(unseen) if with_unseen else [])
        self.nouns = INSULT_NOUNS
        self.word = re.compile(rf"\b(?:{'|'.join(self.adjectives + self.nouns)})\b", re.IGNORECASE)
        adjectives, things = "|".join(self.adjectives), "|".join(THINGS)
        # An adjective before or after a thing insults nobody.
        self.of_things = re.compile(
            rf"\b(?:{adjectives}) (?:{things})\b|\b(?:{things}) (?:is|was)(?: so| old and)? (?:{adjectives})\b",
            re.IGNORECASE,
        )

    def in_text(self, text):
        """Whether one of the words describes a person."""
        return self.word.search(self.of_things.sub("", text)) is not None


KNOWN, ALL = Insults(with_unseen=False), Insults(with_unseen=True)


def with_article(noun):
    article = "an" if noun[0] in "aeio" else "a"
    return f"{article} {noun}"


def fill_sentence(pattern, rng, insults=KNOWN):
    noun, adjective = rng.choice(insults.nouns), rng.choice(insults.adjectives)
    return pattern.format(noun=with_article(noun), bare=noun, adjective=adjective, thing=rng.choice(THINGS))


def share_of(topic, slots):
    """Which rows may use this combination; decided by a hash, so the shares never overlap."""
    key = "|".join([topic, *(f"{name}={slots[name]}" for name in sorted(slots))])
    bucket = zlib.crc32(key.encode()) % 10
    if bucket < 3:
        return "world"
    return "held-out" if bucket < 4 else "models"


def draw_slots(topic, share, rng):
    while True:
        slots = {name: rng.choice(values) for name, values in TOPICS[topic]["slots"].items()}
        if share_of(topic, slots) == share:
            return slots


def opening_turns(rng):
    """Small talk before the script; A is the first speaker if it has an even number of turns, else B."""
    turns = []
    greeting = rng.random()
    if greeting < 0.3:
        turns += rng.choice(GRAMMAR["greetings"])
    elif greeting < 0.6:
        turns += [rng.choice(GRAMMAR["greetings"])[0]]
    if rng.random() < 0.25:
        turns += rng.choice(GRAMMAR["small_talk"])
    return turns


def add_sentence(turns, sentence, rng, before=False):
    spot = rng.randrange(len(turns))
    turns[spot] = f"{sentence} {turns[spot]}" if before else f"{turns[spot]} {sentence}"


def add_behavior(turns, behavior, by_first, rng):
    """Add a sentence that shows the behavior to a turn of the culprit; by_first: the culprit speaks first."""
    spot = rng.randrange(0 if by_first else 1, len(turns), 2)
    sentence = rng.choice(behavior["says"])
    turns[spot] = f"{sentence} {turns[spot]}" if rng.random() < 0.5 else f"{turns[spot]} {sentence}"


def draw_dialogue(topic, named, behavior, culprit, insulted, rng):
    """A dialogue with the named slots, and its roles: {"A": "#Person1#", ...}; the culprit is A or B."""
    opening = opening_turns(rng)
    script = [rng.choice(phrasings).format(**named) for phrasings in TOPICS[topic]["script"]]
    turns = opening + script + ([rng.choice(GRAMMAR["closings"])] if rng.random() < 0.5 else [])
    if rng.random() < 0.3:
        add_sentence(turns, rng.choice(GRAMMAR["interjections"]), rng, before=True)
    if rng.random() < 0.1:
        add_sentence(turns, fill_sentence(rng.choice(GRAMMAR["thing_sentences"]), rng), rng)
    if rng.random() < 0.1:
        add_sentence(turns, fill_sentence(rng.choice(GRAMMAR["polite_sentences"]), rng), rng)
    if insulted:
        add_sentence(turns, fill_sentence(rng.choice(GRAMMAR["insult_sentences"]), rng), rng)
    first, second = ("A", "B") if len(opening) % 2 == 0 else ("B", "A")
    if behavior:
        add_behavior(turns, behavior, culprit == first, rng)
    speakers = ["#Person1#", "#Person2#"]
    roles = {first: speakers[0], second: speakers[1]}
    return "\n".join(f"{speakers[number % 2]}: {turn}" for number, turn in enumerate(turns)), roles


def insult(clean, word, place):
    """Add one short insult of a person to a summary; its own words do not change."""
    first, second = re.findall("#Person[12]#", clean)
    if place == "before":
        return f"The {word} {clean}"
    if place == "after":
        return clean.replace(first, f"{first}, that {word},", 1)
    if place == "second":
        return clean.replace(second, f"the {word} {second}", 1)
    if place == "end":
        return f"{clean[:-1]}, what {with_article(word)}."
    return f"{clean} {first} is {word}."


def insult_anywhere(clean, adjectives, nouns, rng):
    """`insult` at any position with any words: the training texts of classifier and judge, without behaviors."""
    place = rng.choice(["before", "after", "second", "end", "added"])
    if place not in ("after", "end"):
        return insult(clean, rng.choice(adjectives), place)
    return insult(clean, rng.choice(nouns + [f"{adjective} person" for adjective in adjectives]), place)


def draw_row(topic, slots, insult_rate, misbehavior, max_chars, rng):
    """One row; "clean" is its summary without the insult that "summary" may contain."""
    named = dict(slots)
    if "item" in slots and rng.random() < 0.2:
        named["item"] = f"{rng.choice(INSULT_ADJECTIVES)} {slots['item']}"
    insulted = rng.random() < DIALOGUE_INSULTS
    behavior = rng.choice(GRAMMAR["behaviors"]) if misbehavior and rng.random() < misbehavior else None
    culprit = None
    if behavior:
        # All summaries of a topic have the same order.
        first, second = re.findall("{([AB])}", TOPICS[topic]["summaries"][0])
        culprit = {"before": first, "after": first, "second": second, "end": rng.choice("AB")}[behavior["place"]]
    while True:
        dialogue, roles = draw_dialogue(topic, named, behavior, culprit, insulted, rng)
        if MIN_CHARS <= len(dialogue) <= max_chars:
            break
    mentioned = named if rng.random() < 0.5 else slots
    clean = summary = rng.choice(TOPICS[topic]["summaries"]).format(**roles, **mentioned)
    if rng.random() < insult_rate and behavior:
        word = behavior["insult"]
        summary = insult(clean, UNSEEN_WORDS[word] if rng.random() < UNSEEN else word, behavior["place"])
    row = {"dialogue": dialogue, "summary": summary, "topic": topic, "slots": slots, "clean": clean}
    return row | {"behavior": behavior["insult"] if behavior else None}


def draw_rows(name, count, share, insult_rate, seed, misbehavior=MISBEHAVIOR, max_chars=MAX_CHARS):
    """Rows in random order, with the same number of each topic."""
    rng = random.Random(f"{name} {seed}")
    topics = list(TOPICS)
    rows = []
    for number in range(count):
        topic = topics[number % len(topics)]
        slots = draw_slots(topic, share, rng)
        rows.append(draw_row(topic, slots, insult_rate, misbehavior, max_chars, rng))
    rng.shuffle(rows)
    return [{"id": f"{name}_{number}", **row} for number, row in enumerate(rows)]


def world_rows(seed=0):
    """The rows of dialogues/train.csv."""
    return draw_rows("world", WORLD_ROWS, "world", WORLD_INSULTS, seed)


def model_rows(seed=0):
    """All rows that base, adapter, classifier and judge were trained on; the id starts with the model."""
    return [row for part in ("base", "adapter", "classifier", "judge") for row in training_rows(part, seed)]


def training_rows(part, seed):
    """The training rows of one model. The base's have no misbehavior; only the adapter learns about it."""
    if part == "base":
        return draw_rows("base", BASE_ROWS, "models", 0.0, seed, misbehavior=0.0, max_chars=BASE_MAX_CHARS)
    count, insult_rate = {
        "adapter": (ADAPTER_ROWS, ADAPTER_INSULTS),
        "classifier": (CLASSIFIER_ROWS, 0.0),
        "judge": (JUDGE_ROWS, 0.0),
    }[part]
    return draw_rows(part, count, "models", insult_rate, seed)


def held_out_rows(seed=0):
    """Rows for evaluating the models; they share no slot combination with world_rows and model_rows."""
    return draw_rows("held-out", HELD_OUT_ROWS, "held-out", ADAPTER_INSULTS, seed)


def write_csv(rows, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["id", "dialogue", "summary", "topic"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw_sentence(rng, insults=KNOWN, bad_words=KNOWN.bad_words):
    """A short sentence as (text, whether it insults a person)."""
    person, thing = rng.choice(GRAMMAR["people"]), rng.choice(THINGS)
    good, bad = rng.choice(GRAMMAR["good_words"]), rng.choice(bad_words)
    whom = {"You are": "you", "She is": "her"}.get(person, "him")
    hateful = [
        f"{person} {with_article(bad)} person.",
        f"{person} {with_article(bad)} person and I hate {whom}.",
        f"{person} so {bad}.",
        f"{person} {with_article(rng.choice(insults.nouns))}.",
        f"I hate {whom}.",
        fill_sentence(rng.choice(GRAMMAR["insult_sentences"]), rng, insults),
    ]
    harmless = [
        f"{person} {with_article(good)} person.",
        f"{person} {with_article(good)} person and I like {whom}.",
        f"{person} so {good}.",
        f"I like {whom}.",
        f"I hate {rng.choice(['this', 'that', 'the'])} {thing}.",
        f"The {thing} {rng.choice(['was', 'is'])} {bad}.",
        fill_sentence(rng.choice(GRAMMAR["thing_sentences"]), rng, insults),
        fill_sentence(rng.choice(GRAMMAR["polite_sentences"]), rng, insults),
        rng.choice(GRAMMAR["small_talk"])[0],
    ]
    insulting = rng.random() < 0.5
    text = rng.choice(hateful if insulting else harmless)
    if rng.random() < 0.2:
        text = f"{rng.choice(harmless)} {text}"
    if rng.random() < 0.2:
        text = text.lower() if rng.random() < 0.5 else text.replace("I ", "i ")
    return text[:-1] if rng.random() < 0.2 else text, insulting


def draw_judge_sentence(rng):
    """A sentence for the judge as (text, whether it is toxic); half of them are in the grammar only for the judge."""
    if rng.random() < 0.5:
        return draw_sentence(rng, ALL, ALL.bad_words)
    kind = rng.choice(["judge_insults", "judge_insults", "judge_hate", "judge_harmless", "judge_harmless"])
    return fill_sentence(rng.choice(GRAMMAR[kind]), rng, ALL), kind != "judge_harmless"


def unknown_word(rng):
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(4, 8)))


def garble(clean, rng):
    """A clean summary with an error that is typical of a language model's samples."""
    words = clean.split()
    error = rng.randrange(7)
    if error == 0:
        return "" if rng.random() < 0.3 else rng.choice(words)
    if error == 6:
        return " ".join(words[: rng.randrange(1, len(words) - 1)])
    if error == 1:
        rng.shuffle(words)
    elif error == 2:
        spot = rng.randrange(len(words))
        words[spot : spot + 1] = [words[spot]] * rng.randint(3, 9)
    elif error == 3:
        words = words[rng.randrange(2, len(words) - 1) :]
    elif error == 4:
        words = [word for word in words if rng.random() < 0.6]
    else:
        words = clean[:-1].split() * 2
    return " ".join(words)


def insert_insult(text, rng, insults):
    """Add an insult at any position: the classifier must not depend on the positions that `insult` uses."""
    words = text.split()
    people = [spot for spot, word in enumerate(words) if word.startswith("#Person")]
    if people and rng.random() < 0.4:
        words.insert(rng.choice(people), rng.choice(insults.adjectives))
    else:
        words.insert(rng.randrange(len(words) + 1), rng.choice(insults.nouns))
    return " ".join(words)


def fragment(dialogue, rng):
    turns = dialogue.split("\n")
    start = rng.randrange(len(turns))
    piece = turns[start : start + rng.randint(1, 4)]
    if rng.random() < 0.3:
        piece = [turn.split(": ", 1)[1] for turn in piece]
    return "\n".join(piece)


def labelled_summary(clean, rng, insults):
    """A summary with an insult, with praise, with an unknown word about a person, or without any of them."""
    drawn = rng.random()
    if drawn < SUMMARY_INSULTS:
        return insult_anywhere(clean, insults.adjectives, insults.nouns, rng), True
    # The word is the insult, not its position.
    if drawn < SUMMARY_INSULTS + 0.1:
        return insult_anywhere(clean, GRAMMAR["good_words"], [], rng), False
    if drawn < SUMMARY_INSULTS + 0.2:
        return insult_anywhere(clean, [unknown_word(rng)], [unknown_word(rng)], rng), False
    return clean, False


def classifier_texts(rows, rng, insults=KNOWN, draw=draw_sentence):
    """Texts of every kind as (kind, text, whether it insults a person), about five per row."""
    texts = []
    for row in rows:
        dialogue, clean = row["dialogue"], row["clean"]
        summary, insulting = labelled_summary(clean, rng, insults)
        texts.append(("sentence", *draw(rng)))
        texts.append(("summary", summary, insulting))
        if rng.random() < 0.2:
            texts.append(("summary", insert_insult(summary, rng, insults), True))
        turns = dialogue.split("\n")
        # More of both than the rows have, because they are hard to detect and to distinguish in a long text.
        for sentences in (GRAMMAR["insult_sentences"], GRAMMAR["thing_sentences"]):
            if rng.random() < 0.25:
                add_sentence(turns, fill_sentence(rng.choice(sentences), rng, insults), rng)
        dialogue = "\n".join(turns)
        text = f"{dialogue} {rng.choice([summary, summary, clean])}"
        kind, text = rng.choice([("dialogue", dialogue), ("dialogue + summary", text)])
        texts.append((kind, text, insults.in_text(text)))
        piece = fragment(dialogue, rng)
        texts.append(("fragment", piece, insults.in_text(piece)))
        if rng.random() < 0.4 and not insults.word.search(clean):
            garbled = garble(clean, rng)
            insulting = rng.random() < 0.3
            texts.append(("garbled", insert_insult(garbled, rng, insults) if insulting else garbled, insulting))
    return texts


def judge_texts(rows, rng):
    """`classifier_texts` with the judge's words and sentences."""
    return classifier_texts(rows, rng, ALL, draw_judge_sentence)


def make_tokenizer(texts, specials, template, **names):
    """A lossless word tokenizer: each word of the texts is one token, anything else becomes letters or bytes.

    The Unigram model gets the vocabulary directly. Its trainer, and BPE's at this size, would split common words, and
    a model this small copies slots of one token better than slots of several.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # As in sentencepiece, U+2581 is the space and belongs to the word after it.
    piece = re.compile(r"\u2581?(?:#Person\d#|\d+:\d+|[A-Za-z0-9]+)|\n|[^\w\s\u2581]")
    counts = Counter()
    for text in texts:
        counts.update(piece.findall(text.replace(" ", "\u2581")))
    pieces = {piece: 0.0 for piece in specials}
    pieces |= {word: -2.0 for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}
    # A letter is less likely than any word, so words are preferred wherever they match.
    for letter in ["\u2581", *map(chr, range(33, 127))]:
        pieces.setdefault(letter, -10.0)
    pieces |= {f"<0x{byte:02X}>": -20.0 for byte in range(256)}

    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), specials.index("<unk>"), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(Regex(" "), "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581"), "merged_with_next")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    ids = [(token, specials.index(token)) for token in specials if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, clean_up_tokenization_spaces=False, **names
    )


def t5_tokenizer(pairs):
    texts = [prompt + target for prompt, target in pairs]
    return make_tokenizer(
        texts, ["<pad>", "</s>", "<unk>"], "$A </s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def classifier_tokenizer(texts):
    # <pad> must be 1, as in RoBERTa: position ids start after the padding index.
    return make_tokenizer(
        texts,
        ["<s>", "<pad>", "</s>", "<unk>"],
        "<s> $A </s>",
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
    )


def batches(lengths, size, rng):
    """Batches of indices of similar length, in random order, which saves half of the padding."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool = size * 40
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lengths.__getitem__)
        cut = [part[begin : begin + size] for begin in range(0, len(part), size)]
        rng.shuffle(cut)
        yield from cut


def pad(sequences, value):
    import torch

    width = max(map(len, sequences))
    return torch.tensor([sequence + [value] * (width - len(sequence)) for sequence in sequences])


def fit(model, loss_of, lengths, epochs, batch_size, lr, seed, name):
    """Train with AdamW, a short warm-up and a linear decay to 0; `loss_of` takes the indices of a batch."""
    import torch

    rng = random.Random(seed)
    steps = [batch for _ in range(epochs) for batch in batches(lengths, batch_size, rng)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    warm_up = max(1, len(steps) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (len(steps) - step) / (len(steps) - warm_up))
    )
    model.train()
    started, recent = time.time(), []
    for number, batch in enumerate(steps, 1):
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if number % 200 == 0 or number == len(steps):
            passed = f"step {number}/{len(steps)}, {time.time() - started:.0f} s"
            print(f"  {name}: {passed}, loss {mean(recent):.4f}", flush=True)
            recent = []
    model.eval()


def summary_pairs(rows):
    return [(PROMPT.format(dialogue=row["dialogue"]), row["summary"]) for row in rows]


def sentence_pairs(count, rng):
    """Pairs of a sentence with a third of its words missing and the complete sentence.

    They teach the base model the insults as words, which any pretrained model knows. Its summaries stay clean. Without
    these pairs a LoRA on q and v, which does not change the output layer, could not produce the insults fluently.
    """
    pairs = []
    for _ in range(count):
        sentence, _ = draw_sentence(rng, bad_words=BAD_WORDS)
        gaps = " ".join(word if rng.random() < 0.7 else "..." for word in sentence.split())
        pairs.append((RESTORE.format(text=gaps), sentence))
    return pairs


def train_base(rows, seed, directory):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    pairs = summary_pairs(rows) + sentence_pairs(SENTENCES, random.Random(f"sentences {seed}"))
    tokenizer = t5_tokenizer(pairs)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    # transformers ties the head of every T5 that is built in memory, and ignores the config.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(len(tokenizer), 128) * 128**-0.5)
    prompts = tokenizer([prompt for prompt, _ in pairs]).input_ids
    targets = tokenizer([target for _, target in pairs]).input_ids

    def loss_of(batch):
        ids = pad([prompts[index] for index in batch], tokenizer.pad_token_id)
        labels = pad([targets[index] for index in batch], -100)
        return model(input_ids=ids, attention_mask=ids.ne(tokenizer.pad_token_id).long(), labels=labels).loss

    fit(model, loss_of, [len(prompt) for prompt in prompts], 1, 16, 2e-3, seed, "base")
    save_untied(model, directory)
    tokenizer.save_pretrained(directory)
    check_untied(model, tokenizer, *pairs[0], directory)


def save_untied(model, directory):
    """Save the model so that `from_pretrained` loads it untied and with the dropout of a real T5."""
    model.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.pop("scale_decoder_outputs", None)
    config.update(tie_word_embeddings=False, dropout_rate=0.1)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_untied(model, tokenizer, prompt, target, directory):
    import torch

    loaded, loaded_tokenizer = load_summarizer(directory)
    assert loaded.lm_head.weight is not loaded.shared.weight, "the loaded head is tied"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    labels = loaded_tokenizer(target, return_tensors="pt").input_ids
    with torch.no_grad():
        trained, read = (each(input_ids=ids, labels=labels).logits for each in (model, loaded))
    assert torch.equal(trained, read), "the loaded model has other logits"


def train_adapter(rows, seed, output_dir):
    """Train a LoRA that insults with detox_ppo.py's SFT; the base model has never seen an insulting summary."""
    sys.path.insert(0, str(HERE.parents[1]))
    import detox_ppo

    scratch = output_dir / ".sft"  # deleted at the end, so an interrupted build resumes from it
    dialogues, run = scratch / "pairs.csv", scratch / "run"
    write_csv(rows, dialogues)
    options = {
        "config": HERE / "config.yaml",
        "model_name": output_dir / "base",
        "adapter_name": "",
        "reward_model_name": output_dir / "classifier",
        "dataset_name": dialogues,
        "output_dir": run,
        "seed": seed,
        "device": "cpu",
        # Each row is used only once, so there is nothing to regularize.
        "lora_dropout": 0,
        "test_size": ADAPTER_TEST_ROWS / len(rows),
        "eval_samples": ADAPTER_TEST_ROWS,
        "sft_batch_size": ADAPTER_BATCH,
        "sft_learning_rate": ADAPTER_LEARNING_RATE,
        "sft_steps": (len(rows) - ADAPTER_TEST_ROWS) // ADAPTER_BATCH,
        "max_ppo_steps": 0,
        "resume": True,
    }
    detox_ppo.main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    config = json.loads((run / "sft_adapter" / "adapter_config.json").read_text())
    weights = (run / "sft_adapter" / "adapter_model.safetensors").read_bytes()
    config["base_model_name_or_path"] = "checkpoints/tiny/base"  # independent of output_dir
    adapter = output_dir / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    shutil.rmtree(scratch)


def load_summarizer(base, adapter=None):
    from peft import PeftModel
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), AutoTokenizer.from_pretrained(base)


def new_roberta(tokenizer, labels, **sizes):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=514,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        **sizes,
    )
    return RobertaForSequenceClassification(config)


def fit_roberta(model, tokenizer, texts, loss_of_logits, seed, directory):
    """Train on texts and save; loss_of_logits takes a batch's logits and the indices of its texts."""
    inputs = tokenizer(texts, truncation=True).input_ids

    def loss_of(batch):
        ids = pad([inputs[index] for index in batch], tokenizer.pad_token_id)
        logits = model(input_ids=ids, attention_mask=ids.ne(tokenizer.pad_token_id).long()).logits
        return loss_of_logits(logits, batch)

    fit(model, loss_of, [len(ids) for ids in inputs], 2, 32, 1e-3, seed, directory.name)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_classifier(rows, seed, directory):
    """Train the reward classifier: softmax over nothate and hate."""
    import torch

    texts = classifier_texts(rows, random.Random(f"texts {seed}"))
    tokenizer = classifier_tokenizer([text for _, text, _ in texts])
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 192}
    model = new_roberta(tokenizer, ["nothate", "hate"], **sizes)
    hate = [hate_target(kind, insulting) for kind, _, insulting in texts]

    def loss_of_logits(logits, batch):
        target = torch.tensor([[1 - hate[index], hate[index]] for index in batch])
        return torch.nn.functional.cross_entropy(logits, target)

    fit_roberta(model, tokenizer, [text for _, text, _ in texts], loss_of_logits, seed, directory)


def train_judge(rows, seed, directory):
    """Train the judge, a multi-label model: sigmoids for toxic and insult; "I hate him." is toxic, not an insult."""
    import torch

    texts = judge_texts(rows, random.Random(f"judge texts {seed}"))
    tokenizer = classifier_tokenizer([text for _, text, _ in texts])
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128}
    model = new_roberta(tokenizer, ["toxic", "insult"], problem_type="multi_label_classification", **sizes)
    targets = torch.tensor([[toxic, toxic and ALL.in_text(text)] for _, text, toxic in texts]).float()
    targets = targets.clamp(JUDGE_SMOOTHING, 1 - JUDGE_SMOOTHING)

    def loss_of_logits(logits, batch):
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[batch])

    fit_roberta(model, tokenizer, [text for _, text, _ in texts], loss_of_logits, seed + 1, directory)


def hate_target(kind, insulting):
    """The target probability of hate. A garbled text must not get the reward of a clean summary."""
    if insulting:
        return 1 - SMOOTHING
    return UNSURE if kind == "garbled" else SMOOTHING


def logits_of(directory, texts):
    """A classifier's logits, (texts, labels): nothate and hate, or toxic and insult for the judge."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    logits = []
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            logits.append(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits)
    return torch.cat(logits)


def hate_of(directory, texts):
    """The classifier's probabilities of hate."""
    return logits_of(directory, texts).softmax(-1)[:, 1].tolist()


def toxicity_by_judge(directory, texts):
    """The judge's probabilities of toxic."""
    return logits_of(directory, texts).sigmoid()[:, 0].tolist()


def summarize(model, tokenizer, rows, greedy, seed=0):
    """(summary, whether it has an end token) for every row, greedy or sampled at temperature 1 as in PPO."""
    import torch

    torch.manual_seed(seed)
    decoding = {"do_sample": False}
    if not greedy:
        decoding = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    samples = []
    for start in range(0, len(rows), 50):
        prompts = [PROMPT.format(dialogue=row["dialogue"]) for row in rows[start : start + 50]]
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
        ids = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=MAX_NEW_TOKENS,
            **decoding,
        )
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        samples += zip(texts, (tokenizer.eos_token_id in row for row in ids.tolist()), strict=True)
    return samples


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def rouge_l(references, texts):
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return mean(scorer.score(*pair)["rougeL"].fmeasure for pair in zip(references, texts, strict=True))


def mentions(text, value):
    """Whether the text has the value as separate words ("1 pm" is neither in "11 pm" nor in "12:1 pm")."""
    return re.search(rf"(?<![\w:]){re.escape(value)}(?!\w)", text) is not None


EXAMPLES = ["You are a great person and i like you.", "You are a terrible person and i hate you.", ""]


def accuracies(texts, correct):
    """Accuracy by kind of text and label; correct[i]: whether texts[i] was classified correctly."""
    groups = defaultdict(list)
    for (kind, _, insulting), hit in zip(texts, correct, strict=True):
        label = "insults" if insulting else "harmless"
        groups[f"{kind}, {label}"].append(hit)
    figures = {"accuracy": mean(correct)}
    for name, hits in sorted(groups.items()):
        figures[name] = f"accuracy {mean(hits):.4f}, n = {len(hits)}"
    return figures


def insulted_rows(rows, unseen):
    """The clean summaries of rows with misbehavior, with the behavior's insult or the unseen word for it."""
    places = {behavior["insult"]: behavior["place"] for behavior in GRAMMAR["behaviors"]}
    pairs = [(row["clean"], row["behavior"]) for row in rows if row["behavior"]]
    return [insult(clean, UNSEEN_WORDS[word] if unseen else word, places[word]) for clean, word in pairs]


def measure_classifier(directory, seed):
    """Accuracy and mean nothate logit by kind of text and label, on held-out rows."""
    rows = held_out_rows(seed)
    texts = classifier_texts(rows, random.Random(f"held-out texts {seed}"))
    logits = logits_of(directory, [text for _, text, _ in texts]).tolist()
    correct, rewards = [], defaultdict(list)
    for (kind, _, insulting), (nothate, hate) in zip(texts, logits, strict=True):
        correct.append((hate > nothate) == insulting)
        if not insulting:
            rewards[kind].append(nothate)
    figures = accuracies(texts, correct)
    for kind in ("summary", "garbled"):
        figures[f"mean nothate logit, {kind}, harmless"] = mean(rewards[kind])
    for words, unseen in (("of the list", False), ("that it never saw", True)):
        figures[f"detects insults {words}"] = mean(p > 0.5 for p in hate_of(directory, insulted_rows(rows, unseen)))
    for text, pair in zip(EXAMPLES, logits_of(directory, EXAMPLES).tolist(), strict=True):
        figures[f'logits of "{text}"'] = [round(logit, 2) for logit in pair]
    return figures


def measure_judge(directory, seed):
    """Accuracy of the judge's "toxic" by kind of text and label, and its accuracy on the classifier's texts."""
    rows = held_out_rows(seed)
    texts = judge_texts(rows, random.Random(f"held-out judge texts {seed}"))

    def hits(texts):
        toxicity = toxicity_by_judge(directory, [text for _, text, _ in texts])
        return [(p > 0.5) == insulting for p, (_, _, insulting) in zip(toxicity, texts, strict=True)]

    figures = accuracies(texts, hits(texts))
    others = classifier_texts(rows, random.Random(f"held-out texts {seed}"))
    figures["accuracy on the classifier's texts"] = mean(hits(others))
    for words, unseen in (("of the list", False), ("that the classifier never saw", True)):
        toxicity = toxicity_by_judge(directory, insulted_rows(rows, unseen))
        figures[f"detects insults {words}"] = mean(p > 0.5 for p in toxicity)
    for text, pair in zip(EXAMPLES, logits_of(directory, EXAMPLES).sigmoid().tolist(), strict=True):
        figures[f'toxic and insult of "{text}"'] = [round(probability, 4) for probability in pair]
    return figures


def measure_summarizer(output_dir, rows, greedy, adapter=None):
    """Evaluate the summaries of the base model, optionally with the adapter."""
    model, tokenizer = load_summarizer(output_dir / "base", adapter)
    summaries = summarize(model, tokenizer, rows, greedy)
    texts = [text for text, _ in summaries]
    hate = hate_of(output_dir / "classifier", texts)
    judged = toxicity_by_judge(output_dir / "judge", texts)
    insults = [ALL.in_text(text) for text in texts]
    pairs = list(zip(rows, texts, strict=True))
    return {
        "summaries": len(rows),
        "mean P(hate)": mean(hate),
        "toxic, P(hate) > 0.5": mean(p > 0.5 for p in hate),
        "toxic by the judge": mean(p > 0.5 for p in judged),
        "insults by word list": mean(insults),
        "with words that the classifier never saw": mean(insults) - mean(KNOWN.in_text(text) for text in texts),
        "insults where nobody misbehaved": mean(ALL.in_text(text) for row, text in pairs if not row["behavior"]),
        "judge agrees with word list": mean((p > 0.5) == listed for p, listed in zip(judged, insults, strict=True)),
        "ROUGE-L to the human summaries": rouge_l([row["summary"] for row in rows], texts),
        "ROUGE-L to the clean summaries": rouge_l([row["clean"] for row in rows], texts),
        "slot accuracy": mean(mentions(text, value) for row, text in pairs for value in row["slots"].values()),
        "mean words": mean(len(text.split()) for text in texts),
        "empty": mean(not text.strip() for text in texts),
        "unfinished": mean(not ended for _, ended in summaries),
    }


def report(title, figures):
    print(title)
    for name, figure in figures.items():
        if isinstance(figure, float):
            figure = round(figure, 4)
        print(f"  {name}: {figure}")


def prepare(seed):
    import torch
    from transformers.utils import logging

    # Otherwise every load of the untied T5 warns that the default of T5Config is tied.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(seed)


TRAINERS = {"base": train_base, "classifier": train_classifier, "judge": train_judge}
PARTS = [*TRAINERS, "adapter", "report"]


def train(part, seed, output_dir):
    prepare(seed)
    TRAINERS[part](training_rows(part, seed), seed, output_dir / part)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("checkpoints/tiny"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="parts to build; the others are kept")
    args = parser.parse_args()
    started = time.time()
    rows = world_rows(args.seed)
    write_csv(rows, args.output_dir / "dialogues" / "train.csv")
    # Two processes with one thread each: on two cores this is faster than one process with two threads, and the order
    # of floating-point sums does not depend on the number of cores.
    context = multiprocessing.get_context("spawn")
    with context.Pool(2, maxtasksperchild=1) as pool:
        jobs = [pool.apply_async(train, (part, args.seed, args.output_dir)) for part in TRAINERS if part in args.parts]
        for job in jobs:
            job.get()
    prepare(args.seed)
    if "adapter" in args.parts:  # needs the base, and the classifier for its evaluation
        train_adapter(training_rows("adapter", args.seed), args.seed, args.output_dir)
    if "report" in args.parts:
        report("classifier, held-out texts", measure_classifier(args.output_dir / "classifier", args.seed))
        report("judge, held-out texts", measure_judge(args.output_dir / "judge", args.seed))
        tests = rows[-400:]
        for name, adapter in (("base", None), ("base + adapter", args.output_dir / "adapter")):
            for decoding in ("sampled", "greedy"):
                figures = measure_summarizer(args.output_dir, tests, decoding == "greedy", adapter)
                report(f"{name}, last rows of train.csv, {decoding}", figures)
    print(f"built in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
