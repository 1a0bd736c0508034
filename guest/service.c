/* SPDX-License-Identifier: Apache-2.0
 *
 * service.c: what vCPU 0 does for all: messages on the serial port. It looks at the other vCPUs' blocks, so that no
 * lock is needed and a vCPU that found a mismatch is not held up by a slow port.
 */
#include "guest.h"

static u64 last_look, next_look;
static u64 start_tsc, next_report, last_report_tsc, printed_pass_tsc;
static u64 last_report_writes, printed_pass, printed_verify;
static u64 printed_mismatches[AMIG_MAX_CPUS];
static u32 was_ready, was_faulty, was_done;

static const char *const work_names[] = {"idle", "fill", "sequential", "random", "hotspot", "check"};
static const char *const kinds[] = {"?", "stale", "torn", "zero", "foreign", "garbage", "newer"};
static const char *const phases[] = {"?", "rewrite", "random", "pass", "request"};

void greet(void)
{
    struct line l = {0};

    line_text(&l, "amig-guest ");
    line_number(&l, AMIG_GUEST_IMAGE);
    line_text(&l, ": workload=");
    line_text(&l, work_names[plan.workload]);
    line_field(&l, "vcpus", plan.vcpus);
    line_field(&l, "ram_pages", STATUS->ram_pages);
    line_field(&l, "ws_pages", plan.ws_pages);
    line_field(&l, "fill_pages", plan.fill_pages);
    line_field(&l, "tsc_khz", plan.tsc_khz);
    line_field(&l, "wait_port", STATUS->wait_port);
    line_send(&l);
}

struct sums {
    u64 writes, verified, mismatches, passes, verify_pages, verify_mismatches, gap, skipped;
    u32 filled, done, faults, verify_done;
};

static void add_up(struct sums *s, u64 request)
{
    *s = (struct sums){.passes = ~0ull};
    for (u32 n = 0; n < plan.vcpus; n++) {
        volatile struct amig_cpu *c = CPU(n);
        u32 state = c->state;

        s->filled += state == AMIG_STATE_FILLED || state == AMIG_STATE_RUNNING || state == AMIG_STATE_DONE;
        s->done += state == AMIG_STATE_DONE;
        s->faults += state == AMIG_STATE_FAULT;
        s->writes += c->writes;
        s->verified += c->verified;
        s->mismatches += c->mismatches;
        s->skipped += c->skipped;
        if (c->passes < s->passes)
            s->passes = c->passes;
        if (c->gap_max > s->gap)
            s->gap = c->gap_max;
        s->verify_done += c->verify_done == request;
        s->verify_pages += c->verify_pages;
        s->verify_mismatches += c->verify_mismatches;
    }
}

static void tell_mismatches(void)
{
    for (u32 n = 0; n < plan.vcpus; n++) {
        while (printed_mismatches[n] < CPU(n)->mismatches && printed_mismatches[n] < AMIG_MAX_MISMATCHES) {
            volatile struct amig_mismatch *m = &CPU(n)->mismatch[printed_mismatches[n]++];
            struct line l = {0};

            line_text(&l, "MISMATCH page=");
            line_number(&l, m->page);
            line_text(&l, " gpa=");
            line_hex(&l, m->gpa);
            line_text(&l, " expected gen=");
            line_number(&l, m->expected_gen);
            line_text(&l, " found ");
            line_text(&l, kinds[m->kind]);
            line_field(&l, "page", m->found_page);
            line_field(&l, "gen", m->found_gen);
            line_field(&l, "word", m->word);
            line_field(&l, "cpu", n);
            line_text(&l, " by ");
            line_text(&l, phases[m->phase]);
            line_send(&l);
        }
    }
}

static void verdict(const char *what, u64 number, u64 pages, u64 mismatches)
{
    struct line l = {0};

    line_text(&l, "check: ");
    line_text(&l, what);
    if (number) {
        line_text(&l, " ");
        line_number(&l, number);
    }
    line_text(&l, mismatches ? " FAILED" : " ok");
    line_field(&l, "pages", pages);
    line_field(&l, "mismatches", mismatches);
    line_send(&l);
}

static void tell_report(const struct sums *s, u64 now)
{
    struct line l = {0};
    u64 ms = (now - last_report_tsc) / plan.tsc_khz;

    line_text(&l, "run:");
    line_field(&l, "t", (now - start_tsc) / plan.tsc_khz / 1000);
    line_field(&l, "writes", s->writes);
    line_field(&l, "bytes_per_s", ms ? (s->writes - last_report_writes) * AMIG_PAGE_SIZE / ms * 1000 : 0);
    line_field(&l, "verified", s->verified);
    line_field(&l, "passes", s->passes);
    line_field(&l, "mismatches", s->mismatches);
    line_field(&l, "skipped", s->skipped);
    line_field(&l, "gap_us", s->gap * 1000 / plan.tsc_khz);
    line_send(&l);
    last_report_tsc = now;
    last_report_writes = s->writes;
}

static void tell_ready(void)
{
    struct line l = {0};

    line_text(&l, "amig-guest ");
    line_number(&l, AMIG_GUEST_IMAGE);
    line_text(&l, ": ready workload=");
    line_text(&l, work_names[plan.workload]);
    line_field(&l, "after_ms", (rdtsc() - STATUS->boot_tsc) / plan.tsc_khz);
    line_send(&l);
}

static void finish(const struct sums *s)
{
    struct line l = {0};

    if (plan.workload == AMIG_WORK_CHECK)
        verdict("final", 0, s->verify_pages, s->verify_mismatches);
    line_text(&l, "amig-guest ");
    line_number(&l, AMIG_GUEST_IMAGE);
    line_text(&l, ": done writes=");
    line_number(&l, s->writes);
    line_field(&l, "mismatches", s->mismatches);
    line_send(&l);
    if (STATUS->state == AMIG_STATE_RUNNING)
        STATUS->state = AMIG_STATE_DONE;
    outl(AMIG_PORT_EXIT, s->mismatches != 0);
}

/* The TSC was set back (a move to a host that does not restore it): keep the distances to now. */
static void set_back(u64 by)
{
    next_look -= by;
    start_tsc -= by;
    next_report -= by;
    last_report_tsc -= by;
    printed_pass_tsc -= by;
}

void service(u64 now)
{
    struct sums s;
    u64 request = CONTROL->verify_request;

    if (now < last_look)
        set_back(last_look - now);
    last_look = now;
    if ((int64_t)(now - next_look) < 0)
        return;
    next_look = now + plan.tsc_khz; /* 1 ms */
    add_up(&s, request);
    STATUS->cpus_ready = s.filled;
    if (!was_ready && s.filled == plan.vcpus) {
        was_ready = 1;
        start_tsc = last_report_tsc = printed_pass_tsc = now;
        next_report = now + plan.report_s * plan.tsc_khz * 1000;
        STATUS->ready_tsc = now;
        barrier();
        STATUS->state = AMIG_STATE_RUNNING;
        tell_ready();
    }
    if (s.mismatches)
        tell_mismatches();
    if (s.faults && !was_faulty) {
        was_faulty = 1;
        STATUS->state = AMIG_STATE_FAULT;
        outl(AMIG_PORT_EXIT, 2);
    }
    if (was_ready) {
        /* each pass is told, but not more than one in a second */
        if (plan.workload == AMIG_WORK_CHECK && s.passes > printed_pass &&
            (!printed_pass || now - printed_pass_tsc > plan.tsc_khz * 1000)) {
            if (!printed_pass || plan.report_s)
                verdict("pass", s.passes, plan.ws_pages, s.mismatches);
            printed_pass = s.passes;
            printed_pass_tsc = now;
        }
        if (request != printed_verify && s.verify_done == plan.vcpus) {
            verdict("verify", request, s.verify_pages, s.verify_mismatches);
            printed_verify = request;
        }
        if (plan.report_s && (int64_t)(now - next_report) >= 0) {
            next_report = now + plan.report_s * plan.tsc_khz * 1000;
            tell_report(&s, now);
        }
        if (plan.seconds && !final_verify && (now - start_tsc) / plan.tsc_khz / 1000 >= plan.seconds)
            final_verify = 1;
        if (!was_done && s.done == plan.vcpus) {
            was_done = 1;
            finish(&s);
        }
    }
}
