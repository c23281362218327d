"""The miniature backbone: how it is made (``python -m lit_multiip make-mini``) and, under ``weights/``, its weights."""
