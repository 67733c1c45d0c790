"""From images and captions to sets that training streams."""
