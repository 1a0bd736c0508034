/* SPDX-License-Identifier: Apache-2.0
 *
 * work.c: the loop of each vCPU. A paced workload earns page writes as time passes and spends them once a slice, so a
 * late wake-up is made good, but no more than `burst_us` of it: a long pause must not turn into a storm.
 */
#include "guest.h"

struct writer {
    u32 cpu;
    u64 random, next, salt;
    u64 first, pages;
    u64 cost;        /* TSC ticks of one page write, 16 bits of fraction; 0: unpaced */
    u64 credit;      /* TSC ticks earned, 16 bits of fraction */
    u64 credit_max;
};

static void write_one(struct writer *w)
{
    u64 r = random_next(&w->random), i;
    u64 *page;

    switch (plan.workload) {
    case AMIG_WORK_CHECK:
        check_step(w->cpu, &w->random);
        return;
    case AMIG_WORK_SEQUENTIAL:
        i = w->next;
        if (++w->next == w->pages) {
            w->next = 0;
            CPU(w->cpu)->passes++;
        }
        break;
    case AMIG_WORK_HOTSPOT: {
        u64 hot = w->pages * plan.hot_pages / 100;

        hot += !hot;
        if ((r & 0xffff) * 100 < (u64)plan.hot_writes << 16 || hot == w->pages)
            i = below(r, hot);
        else
            i = hot + below(r, w->pages - hot);
        break;
    }
    default:
        i = below(r, w->pages);
        break;
    }
    page = ws_page(w->first + i);
    if (plan.write_mode == AMIG_WRITE_BYTE)
        ((volatile u8 *)page)[r & 0xfff]++;
    else
        content_write(page, plan.fill > AMIG_FILL_ZERO ? plan.fill : AMIG_FILL_RANDOM, w->first + i, ++w->salt);
    CPU(w->cpu)->writes++;
}

static void write_pages(struct writer *w, u64 count)
{
    while (count) {
        u64 batch = count < 8 ? count : 8;

        count -= batch;
        while (batch--)
            write_one(w);
        beat(w->cpu);
    }
}

/* Earns since `last`, returns how many pages may be written now. */
static u64 earned(struct writer *w, u64 elapsed)
{
    u64 n;

    if (!w->cost)
        return 256;
    if ((int64_t)elapsed < 0) /* the TSC was set back */
        elapsed = 0;
    if (elapsed > plan.burst_tsc * 4) { /* bounds the arithmetic; the rest is given up below */
        CPU(w->cpu)->skipped += (elapsed - plan.burst_tsc * 4) / (w->cost >> 16 ? w->cost >> 16 : 1);
        elapsed = plan.burst_tsc * 4;
    }
    w->credit += elapsed << 16;
    if (w->credit > w->credit_max) {
        CPU(w->cpu)->skipped += (w->credit - w->credit_max) / w->cost;
        w->credit = w->credit_max;
    }
    n = w->credit / w->cost;
    w->credit -= n * w->cost;
    return n;
}

static void obey(u32 cpu, u64 *verified_final)
{
    volatile struct amig_cpu *c = CPU(cpu);
    u64 request = CONTROL->verify_request;

    if (request != c->verify_done) {
        if (plan.workload == AMIG_WORK_CHECK)
            check_share(cpu);
        barrier();
        c->verify_done = request;
    }
    if (final_verify && !*verified_final) {
        *verified_final = 1;
        if (plan.workload == AMIG_WORK_CHECK)
            check_share(cpu);
        barrier();
        c->state = AMIG_STATE_DONE;
    }
}

void work(u32 cpu)
{
    volatile struct amig_cpu *c = CPU(cpu);
    int writes = plan.workload >= AMIG_WORK_SEQUENTIAL;
    u64 final = 0, last = rdtsc();
    u32 quiesce;
    struct writer w = {
        .cpu = cpu,
        .random = mix(plan.seed * 0x9e3779b97f4a7c15u + cpu) | 1,
        .first = c->first_page,
        .pages = c->pages,
    };

    if (plan.rate) {
        w.cost = ((plan.tsc_khz * 1000) << 16) * plan.vcpus / (plan.rate / AMIG_PAGE_SIZE);
        w.cost += !w.cost;
        w.credit_max = plan.burst_tsc << 16;
        if (w.credit_max < w.cost)
            w.credit_max = w.cost;
    }
    if (!cpu)
        crash(plan.crash);
    for (;;) {
        u64 now = beat(cpu), used, slice = plan.tick_tsc;

        if (!cpu)
            service(now);
        obey(cpu, &final);
        quiesce = (u32)CONTROL->quiesce;
        if (writes && !final && !quiesce) {
            c->quiesced = 0;
            write_pages(&w, earned(&w, now - last));
            last = now;
            if (!w.cost)
                continue;
            slice = plan.slice_tsc;
        } else {
            c->quiesced = quiesce;
            last = now;
        }
        used = beat(cpu) - now;
        if (used + plan.hundred_us < slice)
            wait_tsc(cpu, slice - used);
        else if (used < slice)
            wait_tsc(cpu, plan.hundred_us);
    }
}
