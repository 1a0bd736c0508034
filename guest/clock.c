/* SPDX-License-Identifier: Apache-2.0
 *
 * clock.c: how fast the TSC runs, and waiting.
 */
#include "guest.h"

#define PIT_HZ 1193182
#define PIT_TICKS 47727 /* 40 ms; the counter runs 55 */
#define PIT_READINGS 4
#define PIT_POLLS 100000
#define PIT_ATTEMPTS 8

static void cpuid(u32 leaf, u32 *a, u32 *b, u32 *c)
{
    u32 d;
    __asm__ volatile("cpuid" : "=a"(*a), "=b"(*b), "=c"(*c), "=d"(d) : "a"(leaf), "c"(0));
}

static u64 tsc_from_cpuid(void)
{
    u32 a, b, c;

    cpuid(1, &a, &b, &c);
    if (c & (1u << 31)) { /* a hypervisor is there */
        cpuid(0x40000000, &a, &b, &c);
        if (a >= 0x40000010 && a < 0x40010000) {
            cpuid(0x40000010, &a, &b, &c);
            if (a)
                return a;
        }
    }
    cpuid(0, &a, &b, &c);
    if (a >= 0x15) {
        cpuid(0x15, &a, &b, &c);
        if (a && b && c)
            return (u64)c * b / a / 1000;
    }
    return 0;
}

struct moment {
    u64 tsc, width; /* somewhere in [tsc, tsc + width] */
    u32 count;      /* the PIT's counter stood here; it counts down */
};

/* The best of some readings: each access may be held up by a busy host, and the latch tells when by the TSC around it. */
static struct moment pit_moment(void)
{
    struct moment best = {0, ~0ull, 0};

    for (u32 i = 0; i < PIT_READINGS; i++) {
        u64 before = rdtsc(), width;
        u32 count;

        outb(0x43, 0x80); /* latch channel 2 */
        width = rdtsc() - before;
        count = inb(0x42);
        count |= (u32)inb(0x42) << 8;
        if (width < best.width)
            best = (struct moment){before, width, count};
    }
    return best;
}

/* TSC against the PIT's channel 2 between two moments some 40 ms apart; 0 when there is no PIT. */
static u64 tsc_from_pit(void)
{
    for (u32 attempt = 0; attempt < PIT_ATTEMPTS; attempt++) {
        struct moment first, last;
        u32 polls = 0;

        outb(0x61, (u8)((inb(0x61) & ~2) | 1)); /* gate on, speaker off */
        outb(0x43, 0xb0);                       /* channel 2, both bytes, one shot: its output rises at 0 */
        outb(0x42, 0xff);
        outb(0x42, 0xff);
        first = pit_moment();
        do {
            last = pit_moment();
            if (++polls == PIT_POLLS)
                return 0;
        } while (first.count - last.count < PIT_TICKS && last.count < first.count && !(inb(0x61) & 0x20));
        if (inb(0x61) & 0x20 || last.count >= first.count) /* held up past the counter's end */
            continue;
        return (last.tsc + last.width / 2 - first.tsc - first.width / 2) * PIT_HZ / (first.count - last.count) / 1000;
    }
    return 0;
}

void tsc_setup(void)
{
    u32 source = AMIG_TSC_OPTION;

    if (!plan.tsc_khz) {
        source = AMIG_TSC_CPUID;
        plan.tsc_khz = tsc_from_cpuid();
    }
    if (!plan.tsc_khz) {
        source = AMIG_TSC_PIT;
        plan.tsc_khz = tsc_from_pit();
    }
    if (!plan.tsc_khz) {
        source = AMIG_TSC_GUESS;
        plan.tsc_khz = 2000000;
    }
    plan.tick_tsc = plan.tick_us * plan.tsc_khz / 1000;
    plan.slice_tsc = plan.slice_us * plan.tsc_khz / 1000;
    plan.burst_tsc = plan.burst_us * plan.tsc_khz / 1000;
    plan.hundred_us = plan.tsc_khz / 10;
    STATUS->tsc_khz = (u32)plan.tsc_khz;
    STATUS->tsc_source = source;
}

void wait_setup(void)
{
    STATUS->wait_port = !plan.spin && inl(AMIG_PORT_PROBE) == AMIG_PROBE_MAGIC;
}

u64 wait_tsc(u32 cpu, u64 ticks)
{
    u64 start = beat(cpu), now = start;

    if (ticks > plan.tick_tsc)
        ticks = plan.tick_tsc;
    if (STATUS->wait_port) {
        CPU(cpu)->waits++;
        outl(AMIG_PORT_WAIT, (u32)(ticks * 1000 / plan.tsc_khz));
        return beat(cpu);
    }
    while (now - start < ticks) {
        for (u32 i = 0; i < 16; i++)
            pause();
        now = beat(cpu);
    }
    return now;
}
