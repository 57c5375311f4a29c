import pytest
from torch.utils.data import DataLoader, Dataset

from internvl_core.errors import DataError
from internvl_core.train.run import _unwrap_worker_error

MESSAGE = "data/a.jsonl:3: 2 <image> tags but 1 image. Fix the record."


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise DataError(MESSAGE)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_record_has_the_same_message_from_a_worker(num_workers: int) -> None:
    with pytest.raises(DataError) as caught:
        next(iter(DataLoader(Broken(), num_workers=num_workers)))
    assert str(_unwrap_worker_error(caught.value)) == MESSAGE
