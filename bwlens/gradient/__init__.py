"""x and delta of every weight matrix, and the gradient they make."""
