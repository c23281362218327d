from pathlib import Path

import pytest
from folders import save


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three people: Ann_Lee with 12 photos, Bo with 3 and Cy with 10."""
    for person, count in {"Ann_Lee": 12, "Bo": 3, "Cy": 10}.items():
        for number in range(1, count + 1):
            save(tmp_path / "photos" / person / f"{person}_{number}.jpg", colour=(number * 20, 0, 0))
    return tmp_path / "photos"
