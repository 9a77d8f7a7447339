package lbproxy

import "testing"

func TestPipesAreBoundedAndNoneIsLost(t *testing.T) {
	before := openPipes()
	var pool pipePool
	inUse := make([]*pipe, maxPipes)
	for range 2 { // once with new pipes, once with used ones
		for i := range inUse {
			if inUse[i] = pool.get(); inUse[i] == nil {
				t.Fatalf("no pipe when %d are in use", i)
			}
		}
		if pool.get() != nil {
			t.Errorf("more than %d pipes", maxPipes)
		}
		pool.drop(inUse[0]) // for which there may be another one
		for _, p := range inUse[1:] {
			pool.put(p)
		}
	}
	pool.mu.Lock()
	pool.spare = len(pool.free)
	pool.mu.Unlock()
	pool.trim()
	if n := openPipes() - before; n != 0 || pool.all != 0 {
		t.Errorf("trimmed: %d descriptors are open, %d pipes counted", n, pool.all)
	}
	late, early := pool.get(), pool.get()
	pool.put(early)
	pool.close()
	pool.put(late)
	if n := openPipes() - before; n != 0 {
		t.Errorf("closed: %d descriptors are open", n)
	}
}
