"""What the kinds of models differ in: how they are recognised, traced and compared."""
