"""The mathematics: no network, no disk, no device."""
