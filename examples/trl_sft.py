"""A LoRA adapter tuned by trl's SFTTrainer, attributed when training ends."""

import tempfile

import peft
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import SFTConfig, SFTTrainer

from hyperinf_kernels.integrations.transformers import InfluenceCallback

torch.manual_seed(0)
words = ["<pad>", "<unk>", "</s>", "what", "follows", *"abcdefgh"]
vocabulary = {word: k for k, word in enumerate(words)}
tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
)
config = transformers.LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
model = peft.get_peft_model(
    transformers.LlamaForCausalLM(config),
    peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
)


def rows(letters):
    pairs = [(letter, chr(ord(letter) + 1)) for letter in letters]
    return Dataset.from_list(
        [{"prompt": f"what follows {a}", "completion": f" {b} "} for a, b in pairs]
    )


with tempfile.TemporaryDirectory() as folder:
    arguments = SFTConfig(
        output_dir=folder, per_device_train_batch_size=4, num_train_epochs=20, learning_rate=2e-2,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, arguments, train_dataset=rows("abcdefg" * 3), processing_class=tokenizer
    )
    callback = InfluenceCallback(trainer, rows("bf"))
    trainer.add_callback(callback)
    trainer.train()
    print("most helpful:", [ids[0] for ids in callback.scores.proponents(1).ids])
