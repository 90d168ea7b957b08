import numpy as np
def describe(image):
    grey = np.asarray(image.convert("L").resize((32, 32)))
    return {"brightness": float(grey.mean()), "contrast": float(grey.std()), "sharpness": 1.0, "thumb": grey.tobytes()}
from dataclasses import dataclass
@dataclass(frozen=True)
class Finding:
    kind: str; severity: str; paths: tuple; action: str; detail: str; score: float = 0.0; value: str = ""
import pandas as pd
def audit(manifest, source): return []
def apply_fixes(m, f, k): return m
def apply_review(m, r): return m
def read_review(p): return pd.read_csv(p)
def findings_table(f, m): return pd.DataFrame(columns=["kind","severity","path","label","group","score","action","value","detail"])
