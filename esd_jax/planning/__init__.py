"""What a run will need, worked out before it begins: from shapes, or by compiling for devices that are not here."""
