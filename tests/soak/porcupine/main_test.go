package main

import (
	"testing"

	"github.com/anishathalye/porcupine"
)

// Operations one after the other, each answered before the next is asked; what has no answer never returns.
func couldBe(ops ...operation) bool {
	history := make([]porcupine.Operation, len(ops))
	for i, op := range ops {
		op.Client, op.Key, op.Call, op.Return = i, "k", int64(10*i), int64(10*i+5)
		history[i] = recorded(op)
	}
	return porcupine.CheckOperations(model, history)
}

func set(value, version int64) operation {
	return operation{Kind: "set", Value: value, Outcome: "ok", Version: version}
}

func swap(value, expected, version int64) operation {
	return operation{Kind: "swap", Value: value, Expected: expected, Outcome: "ok", Version: version}
}

func found(value, version int64) operation {
	return operation{Kind: "read", Outcome: "ok", Found: value, Version: version}
}

var (
	deleted  = operation{Kind: "delete", Outcome: "ok"}
	absent   = operation{Kind: "read", Outcome: "absent"}
	perhaps  = operation{Kind: "set", Value: 9, Outcome: "unknown"}
	lost     = operation{Kind: "set", Value: 9, Outcome: "unknown", Version: 6}
	created  = operation{Kind: "create", Value: 3, Outcome: "ok", Version: 7}
	expired  = operation{Kind: "expire", Value: 1, Outcome: "ok"}
	expiring = operation{Kind: "expire", Value: 9, Outcome: "unknown"}
	mismatch = operation{Kind: "swap", Expected: 4, Outcome: "mismatch", Version: 5}
)

func TestWhatCouldBe(t *testing.T) {
	for name, test := range map[string]struct {
		could bool
		ops   []operation
	}{
		"a read shows the last write":               {true, []operation{set(1, 5), set(2, 6), found(2, 6)}},
		"a read shows an older one":                 {false, []operation{set(1, 5), set(2, 6), found(1, 5)}},
		"a read shows another value":                {false, []operation{set(1, 5), found(2, 5)}},
		"a version that is not greater":             {false, []operation{set(1, 5), set(2, 5)}},
		"a write is lost":                           {false, []operation{set(1, 5), absent}},
		"a delete is seen":                          {true, []operation{set(1, 5), deleted, absent, deleted}},
		"what was deleted is back":                  {false, []operation{set(1, 5), deleted, found(1, 5)}},
		"an open write happened":                    {true, []operation{perhaps, set(1, 5), found(9, 6)}},
		"an open write never happened":              {true, []operation{perhaps, absent, set(1, 5), found(1, 5)}},
		"an open write comes and goes":              {false, []operation{perhaps, set(1, 5), found(9, 6), found(1, 5)}},
		"an open write had an old version":          {false, []operation{set(1, 5), perhaps, found(9, 4)}},
		"what may be lost is there":                 {true, []operation{set(1, 5), lost, found(9, 6)}},
		"what may be lost is lost":                  {true, []operation{set(1, 5), lost, found(1, 5), set(2, 7), found(2, 7)}},
		"what may be lost has one version":          {false, []operation{set(1, 5), lost, found(9, 7)}},
		"what may be lost comes after a newer one":  {false, []operation{set(1, 5), lost, set(2, 7), found(9, 6)}},
		"a condition that held":                     {true, []operation{set(1, 5), swap(2, 5, 6), deleted, created}},
		"a condition that did not":                  {false, []operation{set(1, 5), swap(2, 4, 6)}},
		"two win with the same version":             {false, []operation{set(1, 5), swap(2, 5, 6), swap(3, 5, 7)}},
		"a condition on an open write":              {true, []operation{set(1, 5), perhaps, swap(2, 6, 7)}},
		"a condition on what is older than a write": {false, []operation{set(1, 5), deleted, perhaps, swap(2, 4, 6)}},
		"something is created over something":       {false, []operation{set(1, 5), created}},
		"a mismatch names what is there":            {true, []operation{set(1, 5), mismatch}},
		"what has expired is gone":                  {true, []operation{set(1, 5), found(1, 5), expired, absent, created}},
		"what has expired is back":                  {false, []operation{set(1, 5), expired, found(1, 5)}},
		"what has not expired is gone":              {false, []operation{set(1, 5), absent, expired}},
		"something else does not expire":            {true, []operation{set(1, 5), set(2, 6), expired, found(2, 6)}},
		"an open write has an open end":             {true, []operation{perhaps, expiring, found(9, 6), absent, absent}},
		"a mismatch with what is gone":              {false, []operation{set(1, 5), set(2, 6), mismatch}},
	} {
		if couldBe(test.ops...) != test.could {
			t.Errorf("%s: judged otherwise", name)
		}
	}
}
