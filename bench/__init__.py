"""Measurements. Each module says what it measures and how to run it; nothing here is asserted on in the tests."""
