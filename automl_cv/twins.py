def find_twins(manifest, read): 
    u=manifest[manifest.status=="used"]
    g={}
    for p,h in zip(u.path,u.phash): g.setdefault(h,[]).append(p)
    return [tuple(v) for v in g.values() if len(v)>1]
