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

func remove(expected int64) operation {
	return operation{Kind: "remove", Expected: expected, Outcome: "ok"}
}

func touch(value, version int64) operation {
	return operation{Kind: "touch", Found: value, Outcome: "ok", Version: version}
}

func found(value, version int64) operation {
	return operation{Kind: "read", Outcome: "ok", Found: value, Version: version}
}

var (
	deleted   = operation{Kind: "delete", Outcome: "ok"}
	absent    = operation{Kind: "read", Outcome: "absent"}
	perhaps   = operation{Kind: "set", Value: 9, Outcome: "unknown"}
	lost      = operation{Kind: "set", Value: 9, Outcome: "unknown", Version: 6}
	created   = operation{Kind: "create", Value: 3, Outcome: "ok", Version: 7}
	expired   = operation{Kind: "expire", Value: 1, Outcome: "ok"}
	expiring  = operation{Kind: "expire", Value: 9, Outcome: "unknown"}
	mismatch  = operation{Kind: "swap", Expected: 4, Outcome: "mismatch", Version: 5}
	kept      = operation{Kind: "remove", Expected: 4, Outcome: "mismatch", Version: 5}
	nothing   = operation{Kind: "remove", Expected: 4, Outcome: "mismatch"}
	maybe     = operation{Kind: "remove", Expected: 5, Outcome: "unknown"}
	touching  = operation{Kind: "touch", Outcome: "unknown"}
	untouched = operation{Kind: "touch", Outcome: "absent"}
	undone    = operation{Kind: "touch", Found: 1, Outcome: "unknown", Version: 6}
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
		"a version is deleted":                      {true, []operation{set(1, 5), remove(5), absent, created}},
		"another version is deleted":                {false, []operation{set(1, 5), set(2, 6), remove(5)}},
		"what is deleted by its version is back":    {false, []operation{set(1, 5), remove(5), found(1, 5)}},
		"a version is deleted twice":                {false, []operation{set(1, 5), remove(5), remove(5)}},
		"a delete and a write of one version":       {false, []operation{set(1, 5), remove(5), swap(2, 5, 6)}},
		"another version is not deleted":            {true, []operation{set(1, 5), kept, found(1, 5), deleted, nothing}},
		"what is there is said to be another":       {false, []operation{set(1, 4), nothing}},
		"an open delete of a version happened":      {true, []operation{set(1, 5), maybe, absent}},
		"an open delete of a version did not":       {true, []operation{set(1, 5), maybe, found(1, 5), set(2, 6), found(2, 6)}},
		"an open delete of a version hit another":   {false, []operation{set(1, 4), set(2, 6), maybe, absent}},
		"a touch keeps the value":                   {true, []operation{set(1, 5), touch(1, 6), found(1, 6), swap(2, 6, 7)}},
		"a touch changes the value":                 {false, []operation{set(1, 5), touch(2, 6)}},
		"a touch brings back an older value":        {false, []operation{set(1, 5), set(2, 6), touch(1, 7)}},
		"a touch brings back what was deleted":      {false, []operation{set(1, 5), deleted, touch(1, 6)}},
		"a touch has no new version":                {false, []operation{set(1, 5), touch(1, 5)}},
		"what was touched has its version":          {false, []operation{set(1, 5), touch(1, 6), found(1, 5)}},
		"nothing is touched":                        {true, []operation{untouched, set(1, 5), deleted, untouched}},
		"something is not touched":                  {false, []operation{set(1, 5), untouched}},
		"an open touch happened":                    {true, []operation{set(1, 5), touching, found(1, 6), found(1, 6)}},
		"an open touch did not":                     {true, []operation{set(1, 5), touching, found(1, 5), set(2, 6), found(2, 6)}},
		"an open touch comes and goes":              {false, []operation{set(1, 5), touching, found(1, 6), found(1, 5)}},
		"a touch that may be lost is there":         {true, []operation{set(1, 5), undone, found(1, 6)}},
		"a touch that may be lost is lost":          {true, []operation{set(1, 5), undone, found(1, 5), set(2, 7), found(2, 7)}},
		"a touch that may be lost is of a value":    {false, []operation{set(1, 4), set(2, 5), undone, found(2, 6)}},
		"a mismatch with what is gone":              {false, []operation{set(1, 5), set(2, 6), mismatch}},
	} {
		if couldBe(test.ops...) != test.could {
			t.Errorf("%s: judged otherwise", name)
		}
	}
}
