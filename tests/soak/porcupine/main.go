// Judges whether what clients saw of each key could have happened one operation after the other.
//
// Reads operations as JSON lines from the file named first, writes a picture of a history that could not be to the file
// named second, and exits with 0 (it could be), 1 (it could not) or 2 (not decided in time, or not understood).
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/anishathalye/porcupine"
)

// One operation. A call that was never answered returns at the end of time: it may have happened at any later moment,
// or, which looks the same, after everything else.
type operation struct {
	Client int    `json:"client"`
	Key    string `json:"key"`
	// set, create (if there is nothing), swap (if the version is Expected), delete, remove (a delete if the version is
	// Expected), touch (the value that is there, with a new version), read; expire (the end of Value).
	Kind     string `json:"kind"`
	Value    int64  `json:"value"`
	Expected int64  `json:"expected"`
	Call     int64  `json:"call"`
	Return   int64  `json:"return"`
	// ok, mismatch, absent, unknown.
	Outcome string `json:"outcome"`
	// What the answer named: the version that was written or is there, and the value that was read or touched. A write that was
	// answered and may be lost nevertheless is unknown, with its version.
	Version int64 `json:"version"`
	Found   int64 `json:"found"`
}

// A key. Version 0 with a value: it was written by a call that was never answered, so nobody was told.
type state struct {
	present bool
	value   int64
	version int64
	// The greatest version that the key is known to have had.
	highest int64
}

func (s state) write(op operation) (bool, state) {
	version := int64(0)
	if op.Outcome == "ok" {
		version = op.Version
		if version <= s.highest {
			return false, s
		}
	} else if version = op.Version; version != 0 && version <= s.highest {
		// What is older than what there was never takes its place.
		return true, s
	}
	return true, state{true, op.Value, version, max(s.highest, version)}
}

func (s state) gone() state {
	return state{false, 0, 0, s.highest}
}

// The same value under another version, or under one that nobody was told.
func (s state) touched(version int64) state {
	return state{true, s.value, version, max(s.highest, version)}
}

// What an operation whose condition holds does.
func (s state) change(op operation) (bool, state) {
	if op.Kind == "remove" {
		return true, s.gone()
	}
	return s.write(op)
}

// An answer says that the key has this version.
func (s state) has(version int64) (bool, state) {
	if !s.present || (s.version != 0 && s.version != version) || (s.version == 0 && version <= s.highest) {
		return false, s
	}
	s.version, s.highest = version, max(s.highest, version)
	return true, s
}

func step(s state, op operation) (bool, state) {
	switch op.Kind {
	case "set":
		return s.write(op)
	case "create", "swap", "remove":
		holds, met := !s.present, s
		if op.Kind != "create" {
			holds, met = s.has(op.Expected)
		}
		switch op.Outcome {
		case "unknown":
			if holds {
				return met.change(op)
			}
			return true, s
		case "ok":
			if !holds {
				return false, s
			}
			return met.change(op)
		default: // mismatch, with what is there
			if op.Version == 0 {
				return !s.present && op.Kind != "create", s
			}
			if op.Kind != "create" && op.Version == op.Expected {
				return false, s
			}
			return s.has(op.Version)
		}
	case "touch":
		switch op.Outcome {
		case "absent":
			return !s.present, s
		case "unknown":
			// One that may be lost is of a certain value, and has a version.
			if s.present && (op.Version == 0 || (s.value == op.Found && op.Version > s.highest)) {
				return true, s.touched(op.Version)
			}
			return true, s
		default:
			if !s.present || s.value != op.Found || op.Version <= s.highest {
				return false, s
			}
			return true, s.touched(op.Version)
		}
	case "delete":
		// What is gone already may be deleted once more: two that race both succeed.
		if op.Outcome == "absent" {
			return !s.present, s
		}
		return true, s.gone()
	case "expire":
		// If another value has taken its place, nothing ends.
		if s.present && s.value == op.Value {
			return true, s.gone()
		}
		return true, s
	case "read":
		if op.Outcome == "absent" {
			return !s.present, s
		}
		if s.value != op.Found {
			return false, s
		}
		return s.has(op.Version)
	}
	return false, s
}

var model = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		byKey := map[string][]porcupine.Operation{}
		for _, op := range history {
			key := op.Input.(operation).Key
			byKey[key] = append(byKey[key], op)
		}
		parts := make([][]porcupine.Operation, 0, len(byKey))
		for _, part := range byKey {
			parts = append(parts, part)
		}
		return parts
	},
	Init: func() interface{} { return state{} },
	Step: func(s, input, _ interface{}) (bool, interface{}) {
		return step(s.(state), input.(operation))
	},
	DescribeOperation: func(input, _ interface{}) string {
		op := input.(operation)
		return fmt.Sprintf("%s(%d, if %d): %s %d %d", op.Kind, op.Value, op.Expected, op.Outcome, op.Version, op.Found)
	},
	DescribeState: func(s interface{}) string { return fmt.Sprintf("%+v", s.(state)) },
}

func recorded(op operation) porcupine.Operation {
	end := op.Return
	if op.Outcome == "unknown" {
		end = math.MaxInt64
	}
	return porcupine.Operation{ClientId: op.Client, Input: op, Call: op.Call, Return: end}
}

func read(path string) ([]porcupine.Operation, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var history []porcupine.Operation
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		var op operation
		if err := json.Unmarshal(lines.Bytes(), &op); err != nil {
			return nil, err
		}
		history = append(history, recorded(op))
	}
	return history, lines.Err()
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: porcupine HISTORY.jsonl PICTURE.html")
		os.Exit(2)
	}
	history, err := read(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	result, info := porcupine.CheckOperationsVerbose(model, history, time.Minute)
	switch result {
	case porcupine.Ok:
		return
	case porcupine.Illegal:
		if err := porcupine.VisualizePath(model, info, os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
	fmt.Fprintln(os.Stderr, "not decided within a minute")
	os.Exit(2)
}
