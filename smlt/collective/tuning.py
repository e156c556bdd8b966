import time, logging
from smlt.store.embedded_cluster import EmbeddedCluster
from smlt.store.parameter import ParameterStore
from smlt.store.slots import slot_of
t=time.time()
with EmbeddedCluster(3,1) as c:
    print("up", time.time()-t)
    p=ParameterStore(c.url, job="abc")
    print([ (s.address, s.run_id[:6]) for s in p.survey()])
    pl=p.propose_places(); print(pl,[c.owner(slot_of(x)) for x in pl])
    print(p.locate(pl))
    t=time.time(); s,_,a=p.register(rank=0,world_size=1,generation=1,worker_id="a"); print(s,a,time.time()-t)
    for x in a: 
        i=c.owner(slot_of(x)); c.nodes[i].command("SET",p.session_prefix(s,x)+"foo","bar")
    print(p.count_keys())
    slot=slot_of("abc.0"); o=c.owner(slot)
    t=time.time(); c.migrate(slot,(o+1)%3); print("mig",time.time()-t, c.owner(slot))
    t=time.time(); print(p.roster(s), time.time()-t)
    t=time.time(); c.migrate_at_once(slot,(o+2)%3); print("mig1",time.time()-t, c.owner(slot))
    t=time.time(); print(p.roster(s), time.time()-t)
    o=c.owner(slot); r=c.replica_of(o)
    t=time.time(); c.fail_over(r); print("fo",time.time()-t)
    t=time.time(); print(p.roster(s), time.time()-t)
    c.nodes[r].kill()
    t=time.time()
    while True:
        try: print(p.roster(s), time.time()-t); break
        except Exception as e: print(type(e), e, time.time()-t)
    print(p.leave(rank=0,generation=1,worker_id="a",session=s), p.count_keys())
