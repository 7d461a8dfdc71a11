// Work a backlog of no-op jobs with River, in process, with the settings of its command `river bench`.
//
// Prints ready when the backlog is in the database, starts a client when it reads a line, and prints one line
// of JSON when the database says that all jobs are completed.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
)

const (
	warmUpJobs = 5_000
	insertSize = 5_000
	// A look at the database while nothing but the last completions are to come.
	look = 2 * time.Millisecond
)

var (
	url     = flag.String("database", "", "URL of a database")
	jobs    = flag.Int("jobs", 100_000, "in the backlog")
	body    = flag.Int("body", 300, "bytes of arguments")
	workers = flag.Int("workers", 2_000, "at most at a time")
)

// Args is what every job carries.
type Args struct {
	Body string `json:"body"`
}

// Kind is the name of the job.
func (Args) Kind() string { return "noop" }

type worker struct {
	river.WorkerDefaults[Args]
	first  atomic.Int64
	worked atomic.Int64
}

func (w *worker) Work(context.Context, *river.Job[Args]) error {
	if w.worked.Add(1) == 1 {
		w.first.Store(time.Now().UnixNano())
	}
	return nil
}

type result struct {
	Done  int     `json:"done"`
	First float64 `json:"first"`
	Last  float64 `json:"last"`
	CPU   float64 `json:"cpu"`
}

func main() {
	log.SetFlags(0)
	flag.Parse()
	ctx := context.Background()
	pool := must(pgxpool.New(ctx, *url))
	defer pool.Close()
	_, err := must(rivermigrate.New(riverpgxv5.New(pool), nil)).Migrate(ctx, rivermigrate.DirectionUp, nil)
	check(err)

	fill(ctx, pool, warmUpJobs)
	work(ctx, pool, warmUpJobs)
	fill(ctx, pool, *jobs)
	fmt.Println("ready")
	lines := bufio.NewReader(os.Stdin)
	_, err = lines.ReadString('\n')
	check(err)
	check(json.NewEncoder(os.Stdout).Encode(work(ctx, pool, *jobs)))
	// Stays to be looked at.
	_, _ = lines.ReadString('\n')
}

// fill empties the table and inserts so many jobs.
func fill(ctx context.Context, pool *pgxpool.Pool, count int) {
	client := must(river.NewClient(riverpgxv5.New(pool), &river.Config{}))
	for _, statement := range []string{"TRUNCATE river_job", "VACUUM FULL river_job"} {
		_, err := pool.Exec(ctx, statement)
		check(err)
	}
	args := Args{Body: text(*body - len(`{"body": ""}`))}
	for left := count; left > 0; left -= insertSize {
		batch := make([]river.InsertManyParams, min(left, insertSize))
		for i := range batch {
			batch[i].Args = args
		}
		_, err := client.InsertManyFast(ctx, batch)
		check(err)
	}
	_, err := pool.Exec(ctx, "VACUUM ANALYZE river_job")
	check(err)
}

func text(length int) string {
	letters := make([]byte, max(0, length))
	for i := range letters {
		letters[i] = byte('a' + rand.IntN(26))
	}
	return string(letters)
}

// work starts a client and stops it when the database holds so many completed jobs.
func work(ctx context.Context, pool *pgxpool.Pool, count int) result {
	begun := cpu()
	noop := &worker{}
	registered := river.NewWorkers()
	river.AddWorker(registered, noop)
	client := must(river.NewClient(riverpgxv5.New(pool), &river.Config{
		FetchCooldown:     2 * time.Millisecond,
		FetchPollInterval: 20 * time.Millisecond,
		Logger:            slog.New(slog.NewTextHandler(io.Discard, nil)),
		Queues:            map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: *workers}},
		Workers:           registered,
	}))
	check(client.Start(ctx))
	for noop.worked.Load() < int64(count) {
		time.Sleep(look)
	}
	for !completed(ctx, pool, count) {
		time.Sleep(look)
	}
	done := result{
		Done:  count,
		First: float64(noop.first.Load()) / 1e9,
		Last:  float64(time.Now().UnixNano()) / 1e9,
		CPU:   cpu() - begun,
	}
	check(client.Stop(ctx))
	return done
}

func completed(ctx context.Context, pool *pgxpool.Pool, count int) bool {
	rows := must(pool.Query(ctx, "SELECT count(*) FROM river_job WHERE state = 'completed'"))
	return must(pgx.CollectOneRow(rows, pgx.RowTo[int])) >= count
}

// cpu is the seconds this process has used, of user and system.
func cpu() float64 {
	var usage syscall.Rusage
	check(syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	seconds := func(t syscall.Timeval) float64 { return float64(t.Sec) + float64(t.Usec)/1e6 }
	return seconds(usage.Utime) + seconds(usage.Stime)
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func must[T any](value T, err error) T {
	check(err)
	return value
}
