from PIL import Image
CLASSES=("buildings","forest","glacier","mountain","sea","street")
def draw_scene(label, seed, size=96):
    import numpy as np
    return Image.fromarray(np.random.default_rng([CLASSES.index(label), seed]).integers(0,256,(size,size,3),dtype=np.uint8))
