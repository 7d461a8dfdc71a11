// No-op workers of taskbroker v1's protocol, each on a connection of its own: GetTask, then SetTaskStatus that
// fetches the next. In Go, for what calls costs as much as what is called when both are Python.
//
// Prints ready when it is about to call, and one line of JSON when nothing has been pending for a while.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	service = "/sentry_protos.taskbroker.v1.ConsumerService/"
	// TASK_ACTIVATION_STATUS_COMPLETE
	complete = 5
	idle     = 20 * time.Millisecond
	// For so long a worker asks again when there is nothing.
	patience = time.Second
)

// Of these messages a worker of no-ops reads and writes four fields.
type raw struct{}

func (raw) Name() string                        { return "proto" }
func (raw) Marshal(message any) ([]byte, error) { return *message.(*[]byte), nil }
func (raw) Unmarshal(data []byte, message any) error {
	*message.(*[]byte) = data
	return nil
}

// field returns what a message has under a number of the kind bytes; nil: nothing.
func field(message []byte, wanted protowire.Number) []byte {
	for len(message) > 0 {
		number, kind, size := protowire.ConsumeTag(message)
		if size < 0 {
			log.Fatal(protowire.ParseError(size))
		}
		message = message[size:]
		if number == wanted && kind == protowire.BytesType {
			value, size := protowire.ConsumeBytes(message)
			if size < 0 {
				log.Fatal(protowire.ParseError(size))
			}
			return value
		}
		if size = protowire.ConsumeFieldValue(number, kind, message); size < 0 {
			log.Fatal(protowire.ParseError(size))
		}
		message = message[size:]
	}
	return nil
}

// report is a SetTaskStatusRequest: done, and the next one, please.
func report(task []byte) []byte {
	request := protowire.AppendTag(nil, 1, protowire.BytesType)
	request = protowire.AppendBytes(request, field(task, 1))
	request = protowire.AppendTag(request, 2, protowire.VarintType)
	request = protowire.AppendVarint(request, complete)
	request = protowire.AppendTag(request, 3, protowire.BytesType)
	return protowire.AppendBytes(request, nil)
}

type worker struct {
	first, last time.Time
	callMs      []float64
}

func (w *worker) work(connection *grpc.ClientConn) {
	call := func(method string, request []byte) ([]byte, error) {
		var answer []byte
		err := connection.Invoke(context.Background(), service+method, &request, &answer, grpc.ForceCodec(raw{}),
			grpc.WaitForReady(true))
		return answer, err
	}
	var idleSince time.Time
	for idleSince.IsZero() || w.last.IsZero() || time.Since(idleSince) < patience {
		answer, err := call("GetTask", nil)
		if status.Code(err) == codes.NotFound {
			if idleSince.IsZero() {
				idleSince = time.Now()
			}
			time.Sleep(idle)
			continue
		}
		idleSince = time.Time{}
		if w.first.IsZero() {
			w.first = time.Now()
		}
		for err == nil {
			task := field(answer, 1)
			if task == nil {
				break
			}
			begun := time.Now()
			answer, err = call("SetTaskStatus", report(task))
			w.last = time.Now()
			w.callMs = append(w.callMs, w.last.Sub(begun).Seconds()*1000)
		}
		if err != nil {
			log.Fatal(err)
		}
	}
}

func seconds(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }

func main() {
	workers := flag.Int("workers", 4, "at a time")
	flag.Parse()
	all := make([]worker, *workers)
	fmt.Println("ready")
	var working sync.WaitGroup
	for n := range all {
		connection, err := grpc.NewClient(flag.Arg(0), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			log.Fatal(err)
		}
		working.Go(func() { all[n].work(connection) })
	}
	working.Wait()
	first, last, callMs := time.Time{}, time.Time{}, []float64{}
	for _, w := range all {
		if !w.first.IsZero() && (first.IsZero() || w.first.Before(first)) {
			first = w.first
		}
		if w.last.After(last) {
			last = w.last
		}
		callMs = append(callMs, w.callMs...)
	}
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		log.Fatal(err)
	}
	cpu := time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	result, err := json.Marshal(map[string]any{
		"done": len(callMs), "first": seconds(first), "last": seconds(last), "cpu": cpu.Seconds(), "call_ms": callMs,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(result))
}
