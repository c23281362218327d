"""Small backbones: how they are made (`python -m lit_multiip make-mini`) and, under `weights/`, the miniature."""
