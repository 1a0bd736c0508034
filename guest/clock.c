/* SPDX-License-Identifier: Apache-2.0
 *
 * clock.c: how fast the TSC runs, and waiting.
 */
#include "guest.h"

#define PIT_HZ 1193182
#define PIT_TICKS 23864 /* 20 ms */
#define PIT_TRIES 5

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

/* Counts the TSC over 20 ms of the PIT's channel 2; 0 when there is no PIT. */
static u64 pit_once(void)
{
    u64 start, end;
    u32 tries = 0;

    outb(0x61, (u8)((inb(0x61) & ~2) | 1)); /* gate on, speaker off */
    outb(0x43, 0xb0);                       /* channel 2, both bytes, one shot */
    outb(0x42, PIT_TICKS & 0xff);
    outb(0x42, PIT_TICKS >> 8);
    start = rdtsc();
    while (!(inb(0x61) & 0x20))
        if (++tries == 10000000)
            return 0;
    end = rdtsc();
    if (tries < 10)
        return 0;
    return (end - start) * PIT_HZ / PIT_TICKS / 1000;
}

/* The median: a host that is busy holds us up now at the start, now at the end. */
static u64 tsc_from_pit(void)
{
    u64 khz[PIT_TRIES];

    for (u32 i = 0; i < PIT_TRIES; i++) {
        u64 new = pit_once();
        u32 j = i;

        if (!new)
            return 0;
        for (; j && khz[j - 1] > new; j--)
            khz[j] = khz[j - 1];
        khz[j] = new;
    }
    return khz[PIT_TRIES / 2];
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
