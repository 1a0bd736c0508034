/* SPDX-License-Identifier: Apache-2.0
 *
 * guest.h: what the image's own files share. Everything runs in ring 3 on identity-mapped memory.
 */
#ifndef GUEST_H
#define GUEST_H

#include "amig_guest.h"

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

#define STATUS ((volatile struct amig_status *)AMIG_STATUS_GPA)
#define CONTROL ((const volatile struct amig_control *)AMIG_CONTROL_GPA)
#define CPU(n) ((volatile struct amig_cpu *)(AMIG_CPU_GPA + (u64)(n) * AMIG_CPU_STRIDE))
#define WORDS (AMIG_PAGE_SIZE / 8)

/* ---- the machine ---- */

static inline void outb(u32 port, u8 value)
{
    __asm__ volatile("outb %0, %w1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u8 inb(u32 port)
{
    u8 value;
    __asm__ volatile("inb %w1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline void outl(u32 port, u32 value)
{
    __asm__ volatile("outl %0, %w1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u32 inl(u32 port)
{
    u32 value;
    __asm__ volatile("inl %w1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline u64 rdtsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return ((u64)high << 32) | low;
}

static inline void pause(void)
{
    __asm__ volatile("pause" : : : "memory");
}

static inline void barrier(void)
{
    __asm__ volatile("" : : : "memory");
}

/* ---- what the command line asked for, and the memory it gets (written by vCPU 0 before `plan_ready`) ---- */

struct plan {
    u32 workload, write_mode, fill, vcpus;
    u32 hot_writes, hot_pages;
    u32 tick_us, slice_us, burst_us, report_s, seconds, spin;
    u32 crash;
    u64 seed, rate, ws, ws_from, fill_size;
    u64 tsc_khz;
    /* memory */
    u32 ws_ranges, rest_ranges;
    struct amig_range ws_map[AMIG_MAX_RANGES];
    struct amig_range rest_map[2 * AMIG_MAX_RANGES]; /* usable memory outside the working set */
    u64 ws_pages, fill_pages, gen_gpa;
    u64 tick_tsc, slice_tsc, burst_tsc, hundred_us; /* in TSC ticks */
};

extern struct plan plan;
extern volatile u32 plan_ready; /* 1: go; 2: can't work, stay idle */
extern volatile u32 final_verify; /* vCPU 0: the workload's time is over */

/* The share of vCPU `cpu` in `total` things: [share(cpu), share(cpu + 1)). */
static inline u64 share(u64 total, u32 cpu)
{
    return total * cpu / plan.vcpus;
}

static inline u64 *page_in(const struct amig_range *map, u64 page)
{
    while (page >= map->pages) {
        page -= map->pages;
        map++;
    }
    return (u64 *)(map->gpa + page * AMIG_PAGE_SIZE);
}

static inline u64 *ws_page(u64 page)
{
    return page_in(plan.ws_map, page);
}

/* ---- time and life signs (clock.c) ---- */

void tsc_setup(void);
void wait_setup(void);
u64 wait_tsc(u32 cpu, u64 ticks); /* lets about so many TSC ticks pass, at most one tick_us; returns the TSC */
void service(u64 now);            /* vCPU 0: messages and reports that have come due */

/* One sign of life: counts, and records the largest distance from the one before. Returns the TSC. */
static inline u64 beat(u32 cpu)
{
    volatile struct amig_cpu *c = CPU(cpu);
    u64 now = rdtsc();
    u64 gap = now - c->tsc;
    u64 reset = CONTROL->gap_reset;

    if (reset != c->gap_ack) {
        c->gap_max = 0;
        c->gap_tsc = now;
        c->gap_ack = reset;
    } else if ((int64_t)gap > (int64_t)c->gap_max) { /* signed: a TSC set back is no gap */
        c->gap_max = gap;
        c->gap_tsc = now;
    }
    c->tsc = now;
    c->heartbeat++;
    return now;
}

/* ---- random numbers: xorshift64*, one state for each vCPU ---- */

static inline u64 mix(u64 x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static inline u64 random_next(u64 *state)
{
    u64 x = *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 0x2545f4914f6cdd1du;
}

/* A number below `n` (n < 2^32) from the upper half of `random`. */
static inline u64 below(u64 random, u64 n)
{
    return ((random >> 32) * n) >> 32;
}

/* ---- the parts ---- */

void serial_setup(void);
void serial_write(const char *text, u32 length);

struct line {
    u32 length;
    char text[252];
};
void line_text(struct line *l, const char *text);
void line_number(struct line *l, u64 number);
void line_hex(struct line *l, u64 number);
void line_field(struct line *l, const char *name, u64 number); /* " name=number" */
void line_send(struct line *l);

void parse_cmdline(const char *text); /* fills plan; complains through fail() */
void fail(u32 error, const char *message);
int memory_plan(void);                                  /* fills the memory part of plan */
void memory_read_map(u32 start_info, char *cmdline, u32 size); /* copies the boot data */

#define CRASH_FAULT 1
#define CRASH_SHUTDOWN 2
void crash(u32 kind);

void content_write(u64 *page, u32 kind, u64 number, u64 salt); /* one page of AMIG_FILL_* content */

void check_init(u32 cpu);                 /* generation 1 everywhere in the share */
void check_step(u32 cpu, u64 *random);    /* verify and rewrite one page, verify others */
void check_share(u32 cpu);                /* complete verification of the share */

void work(u32 cpu) __attribute__((noreturn));
void fill_share(u32 cpu);

void *memset(void *to, int byte, u64 size);
void *memcpy(void *to, const void *from, u64 size);

#endif
