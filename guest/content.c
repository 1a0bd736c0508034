/* SPDX-License-Identifier: Apache-2.0
 *
 * content.c: what pages are filled with: zero, one constant, text-like (compresses well), random (does not), mixed.
 */
#include "guest.h"

static const char words[32][9] = {
    "the     ", "guest   ", "memory  ", "page    ", "of a    ", "dirty   ", "log and ", "cleared ",
    "then    ", "written ", "again.\n ", "round   ", "after   ", "to the  ", "link,   ", "which   ",
    "sends   ", "moves   ", "it with ", "little  ", "downtime", "while   ", "running ", "in place",
    "chunk   ", "by chunk", "(see    ", "below)  ", "as long ", "kept    ", "source  ", "target  ",
};

void content_write(u64 *page, u32 kind, u64 number, u64 salt)
{
    u64 x = mix(number * 0x9e3779b97f4a7c15u + plan.seed + salt) | 1;

    if (kind == AMIG_FILL_MIXED)
        kind = number & 1 ? AMIG_FILL_CONST : AMIG_FILL_RANDOM;
    switch (kind) {
    case AMIG_FILL_ZERO:
        for (u32 i = 0; i < WORDS; i++)
            page[i] = 0;
        break;
    case AMIG_FILL_CONST: /* the same byte all over, the same in each page unless it is written anew (salt) */
        x = ((0xa5 + salt) & 0xff) * 0x0101010101010101u;
        for (u32 i = 0; i < WORDS; i++)
            page[i] = x;
        break;
    case AMIG_FILL_TEXT:
        for (u32 i = 0; i < WORDS; i++) {
            u64 word;

            __builtin_memcpy(&word, words[random_next(&x) >> 59], 8);
            page[i] = word;
        }
        break;
    default:
        for (u32 i = 0; i < WORDS; i++)
            page[i] = random_next(&x);
        break;
    }
}

/* This vCPU's part of what is filled before the workload starts. The checking workload brings its own content for the
 * working set; the rest of memory is filled as asked. */
void fill_share(u32 cpu)
{
    volatile struct amig_cpu *c = CPU(cpu);
    int own = plan.workload == AMIG_WORK_CHECK;
    u64 skip = own ? plan.ws_pages : 0;
    u64 total = plan.fill_pages > skip ? plan.fill_pages - skip : 0;
    u64 end = skip + share(total, cpu + 1);

    if (own)
        check_init(cpu);
    for (u64 i = skip + share(total, cpu); i < end; i++) {
        u64 *page = i < plan.ws_pages ? ws_page(i) : page_in(plan.rest_map, i - plan.ws_pages);

        content_write(page, plan.fill, i, 0);
        c->filled++;
        if (!(i & 7)) {
            u64 now = beat(cpu);

            if (!cpu)
                service(now);
        }
    }
}
