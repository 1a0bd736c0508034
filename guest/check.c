/* SPDX-License-Identifier: Apache-2.0
 *
 * check.c: the workload that judges its own memory. Every page of the working set holds
 *
 *     word 0        its number in the working set
 *     word 1        its generation
 *     word 2..511   base + (i >> shift) * step, where base and step come from number, generation and seed
 *
 * so a page that is lost, stale, torn or in the wrong place is noticed whatever part of it is wrong. Half of the pages
 * (fill=mixed) or all (fill=const, fill=text) change only every 64 words, for a content that compresses. The generation
 * that a page should have stands in a table outside the working set, each vCPU's on pages of its own.
 */
#include "guest.h"

struct pattern {
    u64 base, step;
    u32 shift;
};

static struct pattern pattern_of(u64 number, u64 generation)
{
    u64 h = mix(number * 0x9e3779b97f4a7c15u + generation * 0xd1342543de82ef95u + plan.seed);
    struct pattern p = {h, (h * 0xd6e8feb86659fd93u) | 1, 0};

    if (plan.fill == AMIG_FILL_CONST || plan.fill == AMIG_FILL_TEXT || (plan.fill == AMIG_FILL_MIXED && (number & 1)))
        p.shift = 6;
    return p;
}

static void page_write(u64 *page, u64 number, u64 generation)
{
    struct pattern p = pattern_of(number, generation);
    u64 x = p.base;

    if (p.shift) {
        for (u32 i = 0; i < WORDS; i += 64, x += p.step)
            for (u32 j = 0; j < 64; j++)
                page[i + j] = x;
    } else {
        for (u32 i = 0; i < WORDS; i++, x += p.step)
            page[i] = x;
    }
    page[0] = number;
    page[1] = generation;
}

static inline u64 page_differs(const u64 *page, u64 number, u64 generation)
{
    struct pattern p = pattern_of(number, generation);
    u64 x = p.base, bad;

    bad = (page[0] ^ number) | (page[1] ^ generation);
    if (p.shift) {
        for (u32 j = 2; j < 64; j++)
            bad |= page[j] ^ x;
        x += p.step;
        for (u32 i = 64; i < WORDS; i += 64, x += p.step)
            for (u32 j = 0; j < 64; j++)
                bad |= page[i + j] ^ x;
    } else {
        x += 2 * p.step;
        for (u32 i = 2; i < WORDS; i++, x += p.step)
            bad |= page[i] ^ x;
    }
    return bad;
}

static u32 first_bad_word(const u64 *page, u64 number, u64 generation)
{
    struct pattern p = pattern_of(number, generation);

    if (page[0] != number)
        return 0;
    if (page[1] != generation)
        return 1;
    for (u32 i = 2; i < WORDS; i++)
        if (page[i] != p.base + (i >> p.shift) * p.step)
            return i;
    return 0;
}

static u32 kind_of(const u64 *page, u64 number, u64 generation)
{
    u64 any = 0;

    for (u32 i = 0; i < WORDS; i++)
        any |= page[i];
    if (!any)
        return AMIG_BAD_ZERO;
    if (page[0] >= plan.ws_pages)
        return AMIG_BAD_GARBAGE;
    if (!page_differs(page, page[0], page[1])) {
        if (page[0] != number)
            return AMIG_BAD_FOREIGN;
        return page[1] < generation ? AMIG_BAD_STALE : AMIG_BAD_NEWER;
    }
    return page[0] == number ? AMIG_BAD_TORN : AMIG_BAD_GARBAGE;
}

/* Kept out of the way of the quick path. */
static __attribute__((noinline)) void report(u32 cpu, const u64 *page, u64 number, u64 generation, u32 phase)
{
    volatile struct amig_cpu *c = CPU(cpu);
    u64 n = c->mismatches;

    if (n < AMIG_MAX_MISMATCHES) {
        volatile struct amig_mismatch *m = &c->mismatch[n];

        m->page = number;
        m->gpa = (u64)page;
        m->expected_gen = generation;
        m->found_page = page[0];
        m->found_gen = page[1];
        m->kind = kind_of(page, number, generation);
        m->word = first_bad_word(page, number, generation);
        m->phase = phase;
        m->cpu = cpu;
        m->tsc = rdtsc();
    }
    barrier();
    c->mismatches = n + 1;
}

/* Page `i` of the share. */
static inline u64 verify(u32 cpu, u64 first, const u32 *generations, u64 i, u32 phase)
{
    u64 number = first + i;
    const u64 *page = ws_page(number);

    if (__builtin_expect(page_differs(page, number, generations[i]) != 0, 0)) {
        report(cpu, page, number, generations[i], phase);
        return 1;
    }
    return 0;
}

void check_init(u32 cpu)
{
    volatile struct amig_cpu *c = CPU(cpu);
    u32 *generations = (u32 *)c->gen_gpa;
    u64 first = c->first_page, pages = c->pages;

    for (u64 i = 0; i < pages; i++) {
        page_write(ws_page(first + i), first + i, 1);
        generations[i] = 1;
        c->filled++;
        if (!(i & 7)) {
            u64 now = beat(cpu);

            if (!cpu)
                service(now);
        }
    }
}

/* One step: verify a page and write its next generation; verify the next page of the rolling pass; now and then a
 * random one, so that a fault is found early wherever the pass stands. */
void check_step(u32 cpu, u64 *random)
{
    static u64 roll[AMIG_MAX_CPUS][8]; /* a cache line each */
    volatile struct amig_cpu *c = CPU(cpu);
    u32 *generations = (u32 *)c->gen_gpa;
    u64 first = c->first_page, pages = c->pages;
    u64 r = random_next(random);
    u64 i = below(r, pages);

    verify(cpu, first, generations, i, AMIG_PHASE_REWRITE);
    page_write(ws_page(first + i), first + i, ++generations[i]);
    c->writes++;
    verify(cpu, first, generations, roll[cpu][0], AMIG_PHASE_PASS);
    c->verified += 2;
    if (++roll[cpu][0] == pages) {
        roll[cpu][0] = 0;
        c->passes++;
    }
    if (!(r & 7)) {
        verify(cpu, first, generations, below(random_next(random), pages), AMIG_PHASE_RANDOM);
        c->verified++;
    }
}

void check_share(u32 cpu)
{
    volatile struct amig_cpu *c = CPU(cpu);
    const u32 *generations = (const u32 *)c->gen_gpa;
    u64 first = c->first_page, pages = c->pages, bad = 0;

    for (u64 i = 0; i < pages; i++) {
        bad += verify(cpu, first, generations, i, AMIG_PHASE_REQUEST);
        if (!(i & 15)) {
            u64 now = beat(cpu);

            if (!cpu)
                service(now);
        }
    }
    c->verified += pages;
    c->verify_pages = pages;
    c->verify_mismatches = bad;
}
