import collections
import json
import math
import unittest

from support import Case, needs_torch

from everlit import safetensors, state


def there_and_back(value):
    document, leaves = state.flatten(value)
    document = state.from_json(state.to_json(document))
    buffers = {name: safetensors.Buffer(one.dtype, one.shape, memoryview(bytearray(one.memory()[0]))) for name, one in leaves.items()}
    return state.unflatten(document, lambda name, form: safetensors.restore(buffers[name], form)), leaves


class StateTest(Case):
    def test_nested_states_come_back_exactly(self):
        value = {
            "numbers": [1, -(2**80), 0.1, 1e300, float("inf"), -math.inf, True, None],
            "texts": ["", "$x", "a.b", "\ud800", "ü"],
            3: {"4": 5, 4: 6, None: 7, 1.5: 8, True: 9, (1, "x"): (10,)},
            "$tensor": {"$dict": b"raw"},
            "empty": [{}, [], (), b""],
            "count": collections.Counter({3: 2}),
            "order": collections.OrderedDict(a=1),
        }
        back, _ = there_and_back(value)
        self.assertEqual(back, value)
        self.assertIsInstance(back["count"], collections.Counter)
        self.assertEqual([type(one) for one in back["numbers"]], [type(one) for one in value["numbers"]])
        self.assertTrue(math.isnan(there_and_back(float("nan"))[0]))
        self.assertEqual(there_and_back(b"alone")[0], b"alone")

    def test_names_are_paths_and_unique(self):
        value = {"a": {"b.c": b"1", "b": {"c": b"2"}}, "a.b": {"c": b"3"}, "l": [b"4"], "__metadata__": b"5", 7: b"6"}
        back, leaves = there_and_back(value)
        self.assertEqual(back, value)
        self.assertEqual(list(leaves), ["a.b.c", "a.b.c~2", "a.b.c~3", "l.0", "__metadata__~2", "7"])

    def test_what_needs_pickle_is_refused_by_its_place(self):
        for bad, where in [({"a": [object()]}, r"a\.0 is a builtins.object"), ({"f": print}, "f is a builtins"), ({b"k": 1}, "key of type bytes"), ({1j}, "the state is a builtins.set")]:
            with self.assertRaisesRegex(TypeError, where):
                state.flatten(bad)
        deep = []
        for _ in range(200):
            deep = [deep]
        with self.assertRaisesRegex(TypeError, "nested deeper"):
            state.flatten(deep)

    def test_only_tensors_by_name_need_no_document(self):
        def flat(value):
            return state.is_flat(value, state.flatten(value)[1])

        one = safetensors.Buffer("U8", (1,), memoryview(b"x"))
        self.assertTrue(flat({"a.b": one, "c": one}))
        for value in [{}, {"a": {"b": one}}, {"a": one, "n": 1}, {1: one}, {"a": b"x"}, [one], one, {"__metadata__": one}]:
            self.assertFalse(flat(value), value)

    def test_a_document_that_is_none_is_refused(self):
        for text in [b"{}", b"[", b"[]", b'{"format":2,"state":1}', b"[" * 100_000, b"\xff"]:
            with self.assertRaises(ValueError):
                state.from_json(text)
        for document in [{"$other": 1}, {"$float": "12"}, {"$tensor": 7}, {"$dict": 3}]:
            with self.assertRaises(ValueError):
                state.unflatten(document, lambda name, form: None)
        self.assertEqual(json.loads(state.to_json([1])), {"format": 1, "state": [1]})

    @needs_torch
    def test_optimizers_and_schedulers_come_back(self):
        import torch

        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10), torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])]
        for _ in range(4):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            for one in schedulers:
                one.step()
        value = {"optimizer": optimizer.state_dict(), "schedulers": [one.state_dict() for one in schedulers], "rng": torch.get_rng_state()}
        back, leaves = there_and_back(value)
        self.assertIn("optimizer.state.0.exp_avg", leaves)
        self.assertEqual(repr(back), repr({**value}))
        other = torch.optim.AdamW(model.parameters(), lr=0.5)
        other.load_state_dict(back["optimizer"])
        self.assertEqual(repr(other.state_dict()), repr(optimizer.state_dict()))
        again = torch.optim.lr_scheduler.MultiStepLR(other, [1])
        again.load_state_dict(back["schedulers"][1])
        other.step()
        again.step()
        self.assertEqual(again.last_epoch, 5)


if __name__ == "__main__":
    unittest.main()
