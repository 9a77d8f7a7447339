package relay

import (
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

func TestLargeMovesTakeTurnsBesideSmallMessages(t *testing.T) {
	defer lastSmall.Store(0)
	now := Clock() + int64(smallRecent) // after the last test's
	for _, row := range []struct {
		moved int
		after int64
		small bool
	}{
		{smallChunk, 1, false},
		{smallChunk - 1, 1, true},
		{smallChunk, int64(smallRecent), true},
		{smallChunk, int64(smallRecent) + int64(smallGrain), false},
	} {
		now += row.after
		NoteChunk(row.moved, now)
		if got := smallAbout(now); got != row.small {
			t.Errorf("after %d bytes at %d: small messages about %v", row.moved, now, got)
		}
	}
	NoteChunk(1, now)
	if NoteChunk(1, now+1); lastSmall.Load() != now {
		t.Error("the stamp, which all processors share, was written twice at once")
	}
	if takeTurn() { // the stamp is in the future, as a stamp from fake time may be
		t.Error("a turn was taken")
	}
}

func TestTurnsAreBounded(t *testing.T) {
	defer lastSmall.Store(0)
	for range cap(turns) {
		turns <- struct{}{}
	}
	got := make(chan struct{})
	go func() {
		for taken := false; !taken; taken = takeTurn() {
			lastSmall.Store(Clock())
		}
		close(got)
	}()
	proxytest.Eventually(t, "it waits for a turn", waitsForTurn)
	giveTurn(true)
	proxytest.Receive(t, "a turn", got)
	for range cap(turns) {
		giveTurn(true)
	}
	if len(turns) != 0 {
		t.Errorf("%d turns are left", len(turns))
	}
}

func waitsForTurn() bool {
	for _, stack := range proxytest.Goroutines() {
		if strings.Contains(stack, "[chan send") && strings.Contains(stack, "takeTurn") {
			return true
		}
	}
	return false
}

// A stream that need not wait for turns rests.
func TestStreamWithTheLastTurnRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defer lastSmall.Store(0)
		for range cap(turns) - 1 {
			turns <- struct{}{}
			defer giveTurn(true)
		}
		now := Clock()
		d := new(direction)
		check := func(what string, n int, rests bool) {
			t.Helper()
			began := time.Now()
			d.moved.Add(int64(n))
			if d.rest(n, now); time.Since(began) > 0 != rests {
				t.Errorf("%s: rests: %v", what, !rests)
			}
		}
		lastSmall.Store(now - int64(smallRecent) - 1)
		check("no small messages", sharedChunk, false)
		lastSmall.Store(now)
		check("part of a chunk", sharedChunk/2, false)
		check("the rest of it", sharedChunk/2, true)
		check("part of the next", sharedChunk/2, false)
		d.moved.Store(sharedChunk - 1)
		check("a small move", bulkChunk-1, false)
		d.moved.Store(0)
		turns <- struct{}{}
		check("others have all turns", sharedChunk, false)
		giveTurn(true)
		check("one turn is free", sharedChunk, true)
	})
}

// The rest of a large message is small, too. It is no small message unless another one follows.
func TestSmallChunkAmongLargeOnesIsNoMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server, h, r := joinPipes(newEngine(t, Config{}), nil)
		defer lastSmall.Store(lastSmall.Load())
		const long = -1 << 60 // ago
		lastSmall.Store(long)
		go io.Copy(io.Discard, server)
		for range 5 {
			client.Write(make([]byte, LargeBuffer))
			client.Write(make([]byte, 100))
			synctest.Wait()
		}
		if lastSmall.Load() != long {
			t.Error("the rest of a large message counts as a small one")
		}
		client.Write(make([]byte, 100))
		synctest.Wait()
		if lastSmall.Load() == long {
			t.Error("the second of two small messages does not count")
		}
		r.Abort(nil)
		h.wait(t)
		client.Close()
		server.Close()
	})
}
