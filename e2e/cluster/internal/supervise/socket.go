package supervise

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

// commandTimeout bounds a command to a process namespace, start included.
const commandTimeout = 30 * time.Second

// Command is what the first process of a namespace is asked over its socket.
type Command struct {
	Op     string // list, start or signal
	Name   string
	Signal syscall.Signal
}

type answer struct {
	Reports []Report
	Error   string
}

// Serve answers commands on a Unix socket until the process ends. A socket in
// a folder, unlike a network address, is reachable from every namespace.
func (t *Table) Serve(path string) error {
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go t.serveOne(conn)
		}
	}()
	return nil
}

func (t *Table) serveOne(conn net.Conn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(commandTimeout))
	var command Command
	if err := json.NewDecoder(conn).Decode(&command); err != nil {
		return
	}
	var reply answer
	if err := t.do(command); err != nil {
		reply.Error = err.Error()
	}
	reply.Reports = t.List()
	json.NewEncoder(conn).Encode(reply)
}

func (t *Table) do(command Command) error {
	switch command.Op {
	case "list":
		return nil
	case "start":
		return t.Start(command.Name)
	case "signal":
		return t.Signal(command.Name, command.Signal)
	}
	return fmt.Errorf("no command %q", command.Op)
}

// Ask sends a command to the socket of a namespace and returns the processes
// there after it.
func Ask(path string, command Command) ([]Report, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(commandTimeout))
	if err := json.NewEncoder(conn).Encode(command); err != nil {
		return nil, err
	}
	var reply answer
	if err := json.NewDecoder(conn).Decode(&reply); err != nil {
		return nil, fmt.Errorf("answer of %s: %w", path, err)
	}
	if reply.Error != "" {
		return reply.Reports, errors.New(reply.Error)
	}
	return reply.Reports, nil
}
