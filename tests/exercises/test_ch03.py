"""Chapter 3: right answers that differ from the checker's own."""

import torch
import torch.nn.functional as F


def dispatch_expert_by_expert(x_TD, e_TK, E):
    tokens = torch.cat([torch.where((e_TK == e).any(-1))[0] for e in range(E)])
    return x_TD[tokens], tokens, torch.stack([(e_TK == e).sum() for e in range(E)])


def dispatch_in_plain_python(x_TD, e_TK, E):
    pairs = sorted((e, t) for t, row in enumerate(e_TK.tolist()) for e in row)
    tokens = [t for _, t in pairs]
    return x_TD[tokens], tokens, [sum(e == wanted for e, _ in pairs) for wanted in range(E)]


def combine_by_index_add(out_AD, slot_A, w_TK):
    weighted = out_AD * w_TK.reshape(-1)[slot_A].unsqueeze(-1)
    return out_AD.new_zeros(len(w_TK), out_AD.shape[-1]).index_add(
        0, slot_A // w_TK.shape[1], weighted
    )


def combine_by_a_matrix(out_AD, slot_A, w_TK):
    T, K = w_TK.shape
    return (F.one_hot(slot_A, T * K).to(w_TK.dtype).T * w_TK.reshape(-1, 1)).view(T, K, -1).sum(
        1
    ) @ out_AD


def layer_with_every_expert_on_every_token(x_TD, router_ED, gate_up_EHD, down_EDF, K):
    w_TE = torch.zeros(len(x_TD), len(router_ED), dtype=x_TD.dtype)
    top = (x_TD @ router_ED.T).topk(K)
    w_TE.scatter_(1, top.indices, torch.softmax(top.values, -1))
    gate, up = torch.einsum("td,ehd->teh", x_TD, gate_up_EHD).chunk(2, -1)
    return torch.einsum("te,tef,edf->td", w_TE, F.silu(gate) * up, down_EDF)


def layer_slot_by_slot(x_TD, router_ED, gate_up_EHD, down_EDF, K):
    y_TD, F_ = torch.zeros_like(x_TD), down_EDF.shape[-1]
    for t, x in enumerate(x_TD):
        p_K, e_K = torch.softmax(router_ED @ x, 0).topk(K)
        for p, e in zip(p_K / p_K.sum(), e_K.tolist()):
            h = gate_up_EHD[e] @ x
            y_TD[t] += p * (down_EDF[e] @ (F.silu(h[:F_]) * h[F_:]))
    return y_TD


def padding_by_counting_empty_places(counts_E):
    counts = [int(c) for c in counts_E]
    empty = sum(max(counts) - c for c in counts)
    return empty / (max(counts) * len(counts))


def padding_from_mean_and_max(counts_E):
    counts = counts_E.float()
    return 1 - counts.mean() / counts.max()


def bytes_from_a_tensor(T, E, K):
    return torch.empty(T, E, -(-T * K // E), device="meta").nbytes


def bytes_in_plain_python(T, E, K):
    places = T * K // E + (T * K % E > 0)
    return T * E * places * 4


RIGHT = {
    "3.1": [dispatch_expert_by_expert, dispatch_in_plain_python],
    "3.2": [combine_by_index_add, combine_by_a_matrix],
    "3.3": [layer_with_every_expert_on_every_token, layer_slot_by_slot],
    "3.4": [padding_by_counting_empty_places, padding_from_mean_and_max],
    "3.5": [bytes_from_a_tensor, bytes_in_plain_python],
    "3.6": ["TFFTTF", " tffttf "],
}
