// Witness checks an audit log with the Go project's own note and tlog: nothing here is ours but the reading of JSON.
//
// usage: witness CASE.json, where the file names the verifier key, the lines of an export, proofs of single entries, and consistency proofs.
// It prints one line for what it found and ends with 0, or says what does not hold and ends with 1.
package main

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

type Line struct {
	Schema     int     `json:"schema"`
	Log        string  `json:"log"`
	First      int64   `json:"first"`
	Size       int64   `json:"size"`
	I          *int64  `json:"i"`
	Hash       string  `json:"hash"`
	Body       *string `json:"body"`
	Checkpoint string  `json:"checkpoint"`
	End        *int64  `json:"end"`
}

type Proof struct {
	I          int64    `json:"i"`
	Hash       string   `json:"hash"`
	Body       *string  `json:"body"`
	Proof      []string `json:"proof"`
	Checkpoint string   `json:"checkpoint"`
}

type Step struct {
	Old   string   `json:"old"`
	New   string   `json:"new"`
	Proof []string `json:"proof"`
}

type Case struct {
	Key    string  `json:"key"`
	Export string  `json:"export"`
	Proofs []Proof `json:"proofs"`
	Steps  []Step  `json:"steps"`
}

func fail(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	os.Exit(1)
}

func hash(text string) tlog.Hash {
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(raw) != tlog.HashSize {
		fail("no hash: %q", text)
	}
	return tlog.Hash(raw)
}

func hashes(texts []string) []tlog.Hash {
	var out []tlog.Hash
	for _, text := range texts {
		out = append(out, hash(text))
	}
	return out
}

// tree opens a checkpoint with note.Open: its size and root.
func tree(signed string, verifier note.Verifier) (int64, tlog.Hash) {
	opened, err := note.Open([]byte(signed), note.VerifierList(verifier))
	if err != nil {
		fail("checkpoint: %v", err)
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) < 4 || lines[0] != verifier.Name() {
		fail("checkpoint of another log: %q", opened.Text)
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil {
		fail("checkpoint: %v", err)
	}
	return size, hash(lines[2])
}

// leaf is the hash of an entry, by its text where there is one.
func leaf(index int64, stated string, body *string) tlog.Hash {
	if body == nil {
		return hash(stated)
	}
	found := tlog.RecordHash([]byte(*body))
	if stated != "" && found != hash(stated) {
		fail("entry %d was altered", index)
	}
	return found
}

type store []tlog.Hash

func (s store) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, at := range indexes {
		if at >= int64(len(s)) {
			return nil, fmt.Errorf("no stored hash %d", at)
		}
		out[i] = s[at]
	}
	return out, nil
}

// export rebuilds the tree over all entries and compares it with each checkpoint on the way.
func export(path string, verifier note.Verifier) (int64, int) {
	file, err := os.Open(path)
	if err != nil {
		fail("%v", err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Buffer(make([]byte, 1<<20), 8<<20)
	var stored store
	var count, size int64
	checkpoints, covered := 0, int64(-1)
	for lines.Scan() {
		var line Line
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			fail("line: %v", err)
		}
		switch {
		case line.Schema == 1:
			size = line.Size
		case line.Checkpoint != "":
			n, root := tree(line.Checkpoint, verifier)
			if n != count {
				fail("a checkpoint over %d entries stands behind %d", n, count)
			}
			if n > 0 {
				found, err := tlog.TreeHash(n, stored)
				if err != nil || found != root {
					fail("entries before %d are not those that were signed", n)
				}
			}
			checkpoints, covered = checkpoints+1, n
		case line.I != nil:
			if *line.I != count {
				fail("entry %d is missing", count)
			}
			more, err := tlog.StoredHashesForRecordHash(count, leaf(count, line.Hash, line.Body), stored)
			if err != nil {
				fail("%v", err)
			}
			stored = append(stored, more...)
			count++
		case line.End != nil:
		default:
			fail("a strange line")
		}
	}
	if count != size || covered != size {
		fail("entries %d, size %d, signed %d", count, size, covered)
	}
	return count, checkpoints
}

func main() {
	raw, err := os.ReadFile(os.Args[1])
	if err != nil {
		fail("%v", err)
	}
	var c Case
	if err := json.Unmarshal(raw, &c); err != nil {
		fail("%v", err)
	}
	verifier, err := note.NewVerifier(c.Key)
	if err != nil {
		fail("key: %v", err)
	}
	for _, p := range c.Proofs {
		n, root := tree(p.Checkpoint, verifier)
		if err := tlog.CheckRecord(hashes(p.Proof), n, root, p.I, leaf(p.I, p.Hash, p.Body)); err != nil {
			fail("entry %d: %v", p.I, err)
		}
	}
	for _, s := range c.Steps {
		oldN, oldRoot := tree(s.Old, verifier)
		n, root := tree(s.New, verifier)
		if err := tlog.CheckTree(hashes(s.Proof), n, root, oldN, oldRoot); err != nil {
			fail("from %d to %d: %v", oldN, n, err)
		}
	}
	var entries int64
	var checkpoints int
	if c.Export != "" {
		entries, checkpoints = export(c.Export, verifier)
	}
	fmt.Printf("entries %d checkpoints %d proofs %d steps %d\n", entries, checkpoints, len(c.Proofs), len(c.Steps))
}
