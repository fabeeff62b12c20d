from test_training import *
import json
def test_dbg(world, tmp_path):
    for n in (1,60):
        s=changed(world, epochs=n, holdout=world.corpus[1:], corpus=world.corpus[:1], evaluate_every=50)
        m=train(s,tmp_path/str(n))
        for l in open(tmp_path/f"{n}.log.jsonl"):
            e=json.loads(l)
            if e.get("held_out") or e["step"]%50==0: print(e)
        print(m.scores)
    assert 0
