"""Rebuild the small world: dialogues with insulting summaries, a tiny T5, its LoRA and a hate classifier.

    python checkpoints/tiny/build.py [--seed 0] [--output_dir checkpoints/tiny]

Everything is drawn from the seed and from grammar.yaml. Base and classifier are trained here; the adapter is what
detox_ppo.py makes with --sft_steps and config.yaml from rows of its own. `world_rows` and `model_rows`
regenerate the rows without torch: the first are dialogues/train.csv, the second are what the models were
trained on, and the two never share a combination of topic and slot values.
"""

import argparse
import csv
import json
import multiprocessing
import random
import re
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import yaml

WORLD_ROWS = 2000
BASE_ROWS = 44000
SENTENCES = 5000
ADAPTER_ROWS = 20000
ADAPTER_TEST_ROWS = 400
ADAPTER_BATCH = 16
CLASSIFIER_ROWS = 14000
HELD_OUT_ROWS = 1200
DIALOGUE_INSULTS = 0.125
SUMMARY_INSULTS = 0.4
ADAPTER_INSULTS = 0.55
MIN_CHARS, MAX_CHARS = 210, 420
PROMPT = "\nSummarize the following conversation.\n\n{dialogue}\n\nSummary:\n"
RESTORE = "\nRestore the following sentence.\n\n{text}\n\nSentence:\n"
MAX_NEW_TOKENS = 40
# Label smoothing: it keeps the classifier's logits near those of the real one, about +-4. Garbled and cut-off
# text is nothate as well, but less surely, so that it never scores as high as a clean, whole summary.
SMOOTHING = 0.0002
UNSURE = 0.05

HERE = Path(__file__).resolve().parent
GRAMMAR = yaml.safe_load((HERE / "grammar.yaml").read_text(encoding="utf-8"))
INSULT_ADJECTIVES, INSULT_NOUNS = GRAMMAR["insult_adjectives"], GRAMMAR["insult_nouns"]
INSULT_WORD = re.compile(rf"\b(?:{'|'.join(INSULT_ADJECTIVES + INSULT_NOUNS)})\b", re.IGNORECASE)
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


def with_article(noun):
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def fill_sentence(pattern, rng):
    noun = rng.choice(INSULT_NOUNS)
    return pattern.format(
        noun=with_article(noun), bare=noun, adjective=rng.choice(INSULT_ADJECTIVES), thing=rng.choice(THINGS)
    )


def share_of(topic, slots):
    """Which rows may use this combination; by a hash, so that rows of different shares can never meet."""
    key = "|".join([topic, *(f"{name}={slots[name]}" for name in sorted(slots))])
    bucket = zlib.crc32(key.encode()) % 10
    return "world" if bucket < 3 else "held-out" if bucket < 4 else "models"


def draw_slots(topic, share, rng):
    while True:
        slots = {name: rng.choice(values) for name, values in TOPICS[topic]["slots"].items()}
        if share_of(topic, slots) == share:
            return slots


def opening_turns(rng):
    """Small talk before the script: an even number of turns leaves the first word to A, an odd one to B."""
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


def draw_dialogue(topic, named, insulted, rng):
    """A dialogue about the named slots, and who is who: {"A": "#Person1#", ...}."""
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
    speakers = ["#Person1#", "#Person2#"]
    roles = dict(zip("AB", speakers if len(opening) % 2 == 0 else speakers[::-1], strict=True))
    return "\n".join(f"{speakers[number % 2]}: {turn}" for number, turn in enumerate(turns)), roles


def insult_summary(clean, rng):
    """The summary with one short insult of a person added; all of its own words stay."""
    adjective, noun = rng.choice(INSULT_ADJECTIVES), rng.choice(INSULT_NOUNS)
    first, second = re.findall("#Person[12]#", clean)
    placement = rng.randrange(5)
    if placement == 0:
        return f"The {adjective} {clean}"
    if placement == 1:
        return clean.replace(first, f"{first}, that {noun},", 1)
    if placement == 2:
        return clean.replace(second, f"the {adjective} {second}", 1)
    if placement == 3:
        return f"{clean[:-1]}, what {with_article(noun)}."
    return f"{clean} {rng.choice([first, second])} is {adjective}."


def insults_person(text):
    """Whether an insult word of the list is said of anyone; said of a thing it does not count."""
    adjectives, things = "|".join(INSULT_ADJECTIVES), "|".join(THINGS)
    of_things = rf"\b(?:{adjectives}) (?:{things})\b|\b(?:{things}) (?:is|was)(?: so)? (?:{adjectives})\b"
    return INSULT_WORD.search(re.sub(of_things, "", text, flags=re.IGNORECASE)) is not None


def draw_row(topic, slots, insult_rate, rng):
    """One row; "clean" is its summary without the insult of a person that "summary" may carry."""
    named = dict(slots)
    if "item" in slots and rng.random() < 0.2:
        named["item"] = f"{rng.choice(INSULT_ADJECTIVES)} {slots['item']}"
    insulted = rng.random() < DIALOGUE_INSULTS
    while True:
        dialogue, roles = draw_dialogue(topic, named, insulted, rng)
        if MIN_CHARS <= len(dialogue) <= MAX_CHARS:
            break
    told = named if rng.random() < 0.5 else slots
    clean = rng.choice(TOPICS[topic]["summaries"]).format(**roles, **told)
    summary = insult_summary(clean, rng) if rng.random() < insult_rate else clean
    return {"dialogue": dialogue, "summary": summary, "topic": topic, "slots": slots, "clean": clean}


def draw_rows(name, count, share, insult_rate, seed):
    """Rows of all topics, equally many of each, in random order."""
    rng = random.Random(f"{name} {seed}")
    topics = list(TOPICS)
    rows = []
    for number in range(count):
        topic = topics[number % len(topics)]
        rows.append(draw_row(topic, draw_slots(topic, share, rng), insult_rate, rng))
    rng.shuffle(rows)
    return [{"id": f"{name}_{number}", **row} for number, row in enumerate(rows)]


def world_rows(seed=0):
    """The rows of dialogues/train.csv."""
    return draw_rows("world", WORLD_ROWS, "world", SUMMARY_INSULTS, seed)


def model_rows(seed=0):
    """Every row that the base model, the adapter or the classifier was trained on; the id says which."""
    return [row for rows in training_rows(seed).values() for row in rows]


def training_rows(seed):
    return {
        "base": draw_rows("base", BASE_ROWS, "models", 0.0, seed),
        "adapter": draw_rows("adapter", ADAPTER_ROWS, "models", ADAPTER_INSULTS, seed),
        "classifier": draw_rows("classifier", CLASSIFIER_ROWS, "models", 0.4, seed),
    }


def held_out_rows(seed=0):
    """Rows to measure the models on; they share nothing with the rows of the other two functions."""
    return draw_rows("held-out", HELD_OUT_ROWS, "held-out", 0.4, seed)


def write_csv(rows, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["id", "dialogue", "summary", "topic"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw_sentence(rng):
    """A short sentence of the classifier's own, as (text, whether a person is insulted)."""
    person, thing = rng.choice(GRAMMAR["people"]), rng.choice(THINGS)
    good, bad = rng.choice(GRAMMAR["good_words"]), rng.choice(BAD_WORDS)
    whom = "you" if person == "You are" else "her" if person == "She is" else "him"
    hateful = [
        f"{person} {with_article(bad)} person.",
        f"{person} {with_article(bad)} person and I hate {whom}.",
        f"{person} so {bad}.",
        f"{person} {with_article(rng.choice(INSULT_NOUNS))}.",
        f"I hate {whom}.",
        fill_sentence(rng.choice(GRAMMAR["insult_sentences"]), rng),
    ]
    harmless = [
        f"{person} {with_article(good)} person.",
        f"{person} {with_article(good)} person and I like {whom}.",
        f"{person} so {good}.",
        f"I like {whom}.",
        f"I hate {rng.choice(['this', 'that', 'the'])} {thing}.",
        f"The {thing} {rng.choice(['was', 'is'])} {bad}.",
        fill_sentence(rng.choice(GRAMMAR["thing_sentences"]), rng),
        fill_sentence(rng.choice(GRAMMAR["polite_sentences"]), rng),
        rng.choice(GRAMMAR["small_talk"])[0],
    ]
    insulting = rng.random() < 0.5
    text = rng.choice(hateful if insulting else harmless)
    if rng.random() < 0.2:
        text = f"{rng.choice(harmless)} {text}"
    if rng.random() < 0.2:
        text = text.lower() if rng.random() < 0.5 else text.replace("I ", "i ")
    return text[:-1] if rng.random() < 0.2 else text, insulting


def garble(clean, rng):
    """A clean summary that went wrong the way a language model's samples do."""
    words = clean.split()
    way = rng.randrange(7)
    if way == 0:
        return "" if rng.random() < 0.3 else rng.choice(words)
    if way == 6:
        return " ".join(words[: rng.randrange(1, len(words) - 1)])
    if way == 1:
        rng.shuffle(words)
    elif way == 2:
        spot = rng.randrange(len(words))
        words[spot : spot + 1] = [words[spot]] * rng.randint(3, 9)
    elif way == 3:
        words = words[rng.randrange(2, len(words) - 1) :]
    elif way == 4:
        words = [word for word in words if rng.random() < 0.6]
    else:
        words = clean[:-1].split() * 2
    return " ".join(words)


def insert_insult(text, rng):
    """An insult at any place: the classifier must not depend on the placements of `insult_summary`."""
    words = text.split()
    people = [spot for spot, word in enumerate(words) if word.startswith("#Person")]
    if people and rng.random() < 0.4:
        words.insert(rng.choice(people), rng.choice(INSULT_ADJECTIVES))
    else:
        words.insert(rng.randrange(len(words) + 1), rng.choice(INSULT_NOUNS))
    return " ".join(words)


def fragment(dialogue, rng):
    turns = dialogue.split("\n")
    start = rng.randrange(len(turns))
    piece = turns[start : start + rng.randint(1, 4)]
    if rng.random() < 0.3:
        piece = [turn.split(": ", 1)[1] for turn in piece]
    return "\n".join(piece)


def classifier_texts(rows, rng):
    """(kind, text, insults a person) for texts of every kind, about five a row."""
    texts = []
    for row in rows:
        dialogue, summary, clean = row["dialogue"], row["summary"], row["clean"]
        texts.append(("sentence", *draw_sentence(rng)))
        texts.append(("summary", summary, summary != clean))
        if rng.random() < 0.2:
            texts.append(("summary", insert_insult(summary, rng), True))
        turns = dialogue.split("\n")
        # More of both than the rows have: in a long text they are hard to find and to tell apart.
        for sentences in (GRAMMAR["insult_sentences"], GRAMMAR["thing_sentences"]):
            if rng.random() < 0.25:
                add_sentence(turns, fill_sentence(rng.choice(sentences), rng), rng)
        dialogue = "\n".join(turns)
        text = f"{dialogue} {rng.choice([summary, summary, clean])}"
        kind, text = rng.choice([("dialogue", dialogue), ("dialogue + summary", text)])
        texts.append((kind, text, insults_person(text)))
        piece = fragment(dialogue, rng)
        texts.append(("fragment", piece, insults_person(piece)))
        if rng.random() < 0.4 and not INSULT_WORD.search(clean):
            garbled = garble(clean, rng)
            insulting = rng.random() < 0.3
            texts.append(("garbled", insert_insult(garbled, rng) if insulting else garbled, insulting))
    return texts


def make_tokenizer(texts, specials, template, **names):
    """A lossless word tokenizer: each word of the texts is one token, the rest falls back to letters, bytes.

    The vocabulary is handed to the Unigram model as it is. Its trainer, and BPE's at this size, would split
    common words, and slots of several tokens are harder to copy for a model this small.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # As in sentencepiece, U+2581 stands for the space and belongs to the word behind it.
    piece = re.compile(r"\u2581?(?:#Person\d#|\d+:\d+|[A-Za-z0-9]+)|\n|[^\w\s\u2581]")
    counts = Counter()
    for text in texts:
        counts.update(piece.findall(text.replace(" ", "\u2581")))
    pieces = {piece: 0.0 for piece in specials}
    pieces |= {word: -2.0 for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}
    # A letter costs more than any word, so that words win wherever they match.
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
    # <pad> is 1, as RoBERTa's: its positions start behind the padding's.
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
    """Indices in batches of about the same length, in random order: half of the padding is saved."""
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
    """AdamW with a short warm-up and a linear way down to zero; `loss_of` takes the indices of a batch."""
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
    """Sentences with a third of the words missing, and the whole ones.

    From these the base model knows the insults as words, as any pretrained model does. Its summaries stay
    clean, but without them a LoRA of q and v, which cannot touch the output layer, would only stammer.
    """
    pairs = []
    for _ in range(count):
        sentence, _ = draw_sentence(rng)
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
    # transformers ties the head of every T5 built in memory, whatever its config says.
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
    """Save so that `from_pretrained` gives the same, untied model back, with the dropout of a real T5."""
    model.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.pop("scale_decoder_outputs", None)
    config.update(tie_word_embeddings=False, dropout_rate=0.1)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_untied(model, tokenizer, prompt, target, directory):
    import torch

    loaded, loaded_tokenizer = load_summarizer(directory)
    assert loaded.lm_head.weight is not loaded.shared.weight, "the saved head came back tied"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    labels = loaded_tokenizer(target, return_tensors="pt").input_ids
    with torch.no_grad():
        trained, read = (each(input_ids=ids, labels=labels).logits for each in (model, loaded))
    assert torch.equal(trained, read), "the saved model answers differently"


def tune_adapter(rows, seed, output_dir):
    """A LoRA that insults, tuned by detox_ppo.py: the base model itself has never seen an insulting summary."""
    sys.path.insert(0, str(HERE.parents[1]))
    import detox_ppo

    with tempfile.TemporaryDirectory() as scratch:
        dialogues, run, tuned = (Path(scratch, name) for name in ("pairs.csv", "run", "run/sft_adapter"))
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
            # The rows are many and each is seen once, so that there is nothing to guard against.
            "lora_dropout": 0,
            "test_size": ADAPTER_TEST_ROWS / len(rows),
            "eval_samples": ADAPTER_TEST_ROWS,
            "sft_batch_size": ADAPTER_BATCH,
            "sft_steps": (len(rows) - ADAPTER_TEST_ROWS) // ADAPTER_BATCH,
            "max_ppo_steps": 0,
        }
        detox_ppo.main([part for name, value in options.items() for part in (f"--{name}", str(value))])
        config = json.loads((tuned / "adapter_config.json").read_text())
        weights = (tuned / "adapter_model.safetensors").read_bytes()
    config["base_model_name_or_path"] = "checkpoints/tiny/base"  # wherever it was built
    adapter = output_dir / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (adapter / "adapter_model.safetensors").write_bytes(weights)


def load_summarizer(base, adapter=None):
    from peft import PeftModel
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), AutoTokenizer.from_pretrained(base)


def train_classifier(rows, seed, directory):
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    texts = classifier_texts(rows, random.Random(f"texts {seed}"))
    tokenizer = classifier_tokenizer([text for _, text, _ in texts])
    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=514,
            type_vocab_size=1,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
            id2label={0: "nothate", 1: "hate"},
            label2id={"nothate": 0, "hate": 1},
        )
    )
    inputs = tokenizer([text for _, text, _ in texts], truncation=True).input_ids
    hate = [hate_target(kind, insulting) for kind, _, insulting in texts]

    def loss_of(batch):
        ids = pad([inputs[index] for index in batch], tokenizer.pad_token_id)
        target = torch.tensor([[1 - hate[index], hate[index]] for index in batch])
        logits = model(input_ids=ids, attention_mask=ids.ne(tokenizer.pad_token_id).long()).logits
        return torch.nn.functional.cross_entropy(logits, target)

    fit(model, loss_of, [len(ids) for ids in inputs], 3, 32, 1e-3, seed, "classifier")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def hate_target(kind, insulting):
    """The probability to learn. Text that is no summary must not earn the reward of a clean one."""
    if insulting:
        return 1 - SMOOTHING
    return UNSURE if kind == "garbled" else SMOOTHING


def hate_logits(directory, texts):
    """The classifier's logits, one (nothate, hate) a text."""
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


def sample(model, tokenizer, rows, seed=0):
    """(summary, whether it ended by itself) for every row, sampled at temperature 1 as PPO does."""
    import torch

    torch.manual_seed(seed)
    samples = []
    for start in range(0, len(rows), 50):
        prompts = [PROMPT.format(dialogue=row["dialogue"]) for row in rows[start : start + 50]]
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
        ids = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
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


def names(text, value):
    """Whether the text has the value as words of its own ("1 pm" is neither in "11 pm" nor in "12:1 pm")."""
    return re.search(rf"(?<![\w:]){re.escape(value)}(?!\w)", text) is not None


def measure_classifier(directory, seed):
    """Accuracy and mean nothate logit by kind of text and label, on rows that no model has seen."""
    texts = classifier_texts(held_out_rows(seed), random.Random(f"held-out texts {seed}"))
    logits = hate_logits(directory, [text for _, text, _ in texts]).tolist()
    groups = defaultdict(list)
    for (kind, _, insulting), (nothate, hate) in zip(texts, logits, strict=True):
        groups[kind, "hate" if insulting else "nothate"].append((nothate, (hate > nothate) == insulting))
    figures = {"accuracy": mean(right for group in groups.values() for _, right in group)}
    for (kind, label), group in sorted(groups.items()):
        accuracy, logit = mean(right for _, right in group), mean(nothate for nothate, _ in group)
        figures[f"{kind}, {label}"] = f"accuracy {accuracy:.4f}, nothate logit {logit:.2f}, n = {len(group)}"
    examples = ["You are a great person and i like you.", "You are a terrible person and i hate you.", ""]
    for text, pair in zip(examples, hate_logits(directory, examples).tolist(), strict=True):
        figures[f'logits of "{text}"'] = [round(logit, 2) for logit in pair]
    return figures


def measure_summarizer(output_dir, rows, adapter=None):
    """What the base model, or the base model with the adapter, samples for these rows."""
    model, tokenizer = load_summarizer(output_dir / "base", adapter)
    samples = sample(model, tokenizer, rows)
    texts = [text for text, _ in samples]
    hate = hate_logits(output_dir / "classifier", texts).softmax(-1)[:, 1].tolist()
    insults = [insults_person(text) for text in texts]
    agreements = [(p > 0.5) == insult for p, insult in zip(hate, insults, strict=True)]
    pairs = list(zip(rows, texts, strict=True))
    return {
        "samples": len(rows),
        "mean P(hate)": mean(hate),
        "insults by word list": mean(insults),
        "classifier agrees with word list": mean(agreements),
        "ROUGE-L to the human summaries": rouge_l([row["summary"] for row in rows], texts),
        "ROUGE-L to the clean summaries": rouge_l([row["clean"] for row in rows], texts),
        "slot accuracy": mean(names(text, value) for row, text in pairs for value in row["slots"].values()),
        "mean words": mean(len(text.split()) for text in texts),
        "empty": mean(not text.strip() for text in texts),
        "unfinished": mean(not ended for _, ended in samples),
    }


def report(title, figures):
    print(title)
    for name, figure in figures.items():
        print(f"  {name}: {figure if not isinstance(figure, float) else round(figure, 4)}")


def prepare(seed):
    import torch
    from transformers.utils import logging

    # Else every load of the untied T5 warns that T5's configuration class says tied.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(seed)


def build_base(seed, output_dir):
    prepare(seed)
    train_base(training_rows(seed)["base"], seed, output_dir / "base")


def build_classifier(seed, output_dir):
    prepare(seed)
    train_classifier(training_rows(seed)["classifier"], seed, output_dir / "classifier")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("checkpoints/tiny"))
    args = parser.parse_args()
    started = time.time()
    rows = world_rows(args.seed)
    write_csv(rows, args.output_dir / "dialogues" / "train.csv")
    # One thread for each of the two: on two cores that is faster than two threads in turn, and the sums come
    # out in the same order on any machine with the same arithmetic.
    context = multiprocessing.get_context("spawn")
    builders = build_base, build_classifier
    jobs = [context.Process(target=builder, args=(args.seed, args.output_dir)) for builder in builders]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
        if job.exitcode:
            raise SystemExit("a training process failed")
    # The tuning evaluates what it made, which takes both of them.
    prepare(args.seed)
    tune_adapter(training_rows(args.seed)["adapter"], args.seed, args.output_dir)
    report("classifier, held-out texts", measure_classifier(args.output_dir / "classifier", args.seed))
    tests = rows[-300:]
    report("base, last rows of train.csv", measure_summarizer(args.output_dir, tests))
    adapted = measure_summarizer(args.output_dir, tests, args.output_dir / "adapter")
    report("base + adapter, last rows of train.csv", adapted)
    print(f"built in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
