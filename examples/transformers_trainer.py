"""A fine-tuned PeftModel, attributed by its own Trainer in two lines."""

import tempfile

import peft
import torch
import transformers

from hyperinf_kernels.integrations.transformers import attribute

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
model = peft.get_peft_model(
    transformers.LlamaForCausalLM(config),
    peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
)


def rows(n):
    ids = torch.randint(1, 61, (n, 8)).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * 8} for row in ids]


with tempfile.TemporaryDirectory() as folder:
    arguments = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=8, num_train_epochs=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows(24))
    trainer.train()
    scores = attribute(trainer, rows(3))
    print("most helpful:", [ids[0] for ids in scores.proponents(1).ids])
