import torch

from trainer.checkpoints.ema import EMA


def held(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), value), "nothing of it": torch.zeros(0)}


def test_half_of_a_change_is_taken_in_after_a_half_life():
    values = held(0.0)
    ema = EMA(values, halflife=100)
    values["w"].fill_(1.0)
    for step in range(10):
        ema.update(samples=1_000_000 + step, batch=10)
    torch.testing.assert_close(ema.averages["w"], torch.full((3,), 0.5))


def test_half_life_does_not_depend_on_the_batch():
    averages = []
    for batch in (1, 50):
        values = held(0.0)
        ema = EMA(values, halflife=100)
        values["w"].fill_(1.0)
        for _ in range(200 // batch):
            ema.update(samples=1_000_000, batch=batch)
        averages.append(ema.averages["w"])
    torch.testing.assert_close(*averages)


def test_random_start_is_forgotten_early():
    values = held(100.0)
    ema = EMA(values, halflife=1_000_000)
    values["w"].fill_(1.0)
    for samples in range(10, 1010, 10):
        ema.update(samples=samples, batch=10)
    assert abs(float(ema.averages["w"][0]) - 1.0) < 0.01


def test_averages_stand_in_and_weights_come_back_even_after_an_error():
    values, followed = held(1.0), []
    ema = EMA(values, halflife=0, refresh=lambda: followed.append(float(values["w"][0])))
    values["w"].fill_(2.0)
    try:
        with ema.applied():
            assert float(values["w"][0]) == 1.0
            raise RuntimeError
    except RuntimeError:
        pass
    assert float(values["w"][0]) == 2.0
    assert float(ema.averages["w"][0]) == 1.0
    assert followed == [1.0, 2.0]
