import os
import signal
import unittest

from support import Case, needs_transformers, read_json, until

from everlit import checks, choose

SCRIPT = """
import sys, torch
from transformers import Trainer, TrainingArguments
from everlit.transformers import EverlitCallback

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(4, 1)
    def forward(self, x, labels):
        out = self.line(x)
        return {"loss": torch.nn.functional.mse_loss(out, labels), "out": out}

data = [{"x": torch.ones(4) * (n % 7), "labels": torch.ones(1)} for n in range(64)]
steps, save = int(sys.argv[1]), int(sys.argv[2])
args = TrainingArguments("out", max_steps=steps, save_steps=save, save_strategy="steps", logging_steps=5, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True)
everlit = EverlitCallback("checkpoints")
trainer = Trainer(Model(), args, train_dataset=data, callbacks=[everlit])
path = everlit.resume_path()
print("resuming from", path, flush=True)
trainer.train(resume_from_checkpoint=path)
print("done at", trainer.state.global_step)
"""


@needs_transformers
class TrainerTest(Case):
    def run_trainer(self, steps, save, code=0, **environment):
        return self.done(self.start([*self.script(SCRIPT), str(steps), str(save)], **environment), code)

    def test_a_trainer_goes_on_from_a_verified_checkpoint(self):
        self.assertIn("resuming from None", self.run_trainer(20, 10))
        found = choose.list_checkpoints(self.path("checkpoints"))
        self.assertEqual([one.step for one in found], [20, 10])
        for one in found:
            checks.verify(one.path)
        output = self.run_trainer(30, 10)
        self.assertIn("checkpoints/step-000000000020", output)
        self.assertIn("done at 30", output)
        # The Trainer wrote into its own folders again; what was committed did not change.
        for one in choose.list_checkpoints(self.path("checkpoints")):
            checks.verify(one.path)

    def test_sigterm_saves_and_ends_with_143(self):
        environment = {"EVERLIT_HEARTBEAT_FILE": self.path("HEARTBEAT"), "EVERLIT_CHECKPOINT_DIR": self.path("c"), "EVERLIT_RESUME_FROM": "", "EVERLIT_ATTEMPT": "1"}
        running = self.start([*self.script(SCRIPT), "1000000", "1000000"], **environment)
        beat = lambda: read_json(self.path("HEARTBEAT")) if os.path.exists(self.path("HEARTBEAT")) else {}
        value = until("steps", lambda: (b := beat()).get("step", 0) > 20 and "lr" in b.get("metrics", {}) and b, 120)
        self.assertEqual((value["phase"], value["total_steps"], value["saves_on_signal"]), ("train", 1_000_000, True))
        self.assertIn("loss", value)
        running.send_signal(signal.SIGTERM)
        self.done(running, 143)
        [found] = choose.list_checkpoints(self.path("c"))
        self.assertEqual(beat()["step"], found.step)
        checks.verify(found.path)


if __name__ == "__main__":
    unittest.main()
